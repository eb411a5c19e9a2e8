from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from internlm.core.context import ParallelMode
from internlm.core.parallel.ledger import Entry
from internlm.verify.compare import Report, compare, compare_traffic
from internlm.verify.configs import make_plan
from internlm.verify.record import Pass, RankCoordinates, RankRecord, Site, TensorShards
from internlm.verify.report import as_json, as_text, heading
from tests.unit.verify.test_plan import SMALL

PLAN = make_plan(SMALL, ("model_type=MINE",), world_size=2, steps=1)
W = torch.arange(1.0, 5.0, dtype=torch.float64)


def _pass(outputs: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> Pass:
    return Pass({_output(k): v for k, v in outputs.items()} | {_gradient(k): v for k, v in gradients.items()})


def _output(module: str) -> Site:
    return Site(module, "")


def _gradient(module: str) -> Site:
    return Site(module, "", is_gradient=True)


def _record(data: int = 0, *, loss: float = 2.0, norm: float = 1.0, w: torch.Tensor = W, rows: int = 1) -> RankRecord:
    shards = {"w": TensorShards((4,), {(0,): w})}
    passes = [_pass({"a": W + row, "b": W + row}, {"b": W, "a": W}) for row in range(data, data + rows)]
    return RankRecord(
        coordinates=RankCoordinates(data, 0, 0),
        losses=[loss],
        sums=[[16 * loss], [3.0], [16.0]],
        norms=[norm],
        gradients=shards,
        parameters=shards,
        passes=passes,
        traffic=[{}],
        tokens=[[8]],
        types=1,
        peak_in_flight=1,
    )


def _compare(*ranks: RankRecord) -> Report:
    return compare(PLAN.config, _record(rows=len(ranks)), ranks)


def test_equal_records_pass() -> None:
    report = _compare(_record(0), _record(1))
    assert report.passed
    assert report.traffic is None  # of a model that nobody knows
    assert "PASS" in as_text(report).splitlines()[-1]
    assert "seed 1024, on cpu: 2 ranks (mtp, zero1 2; 2 x 3 micro-batches)" in heading(PLAN)


@pytest.mark.parametrize("loss", [2.0 + 1e-10, math.nan, math.inf])
def test_another_loss_fails(loss: float) -> None:
    report = _compare(_record(0, loss=loss), _record(1, loss=loss))
    assert [failure.split(":")[0] for failure in report.failures] == [
        "loss of step 1",
        "summed loss by dataset type, step 1",
    ]
    found = json.loads(as_json(PLAN, report), parse_constant=lambda text: pytest.fail(text))
    assert found["passed"] is False
    assert found["losses"][0]["reference"] == 2.0


def test_wrong_predictions_or_tokens_of_a_data_set_type_fail() -> None:
    ranks = [replace(_record(rank), sums=[[32.0], [4.0], [16.0]]) for rank in range(2)]
    assert [row.name for row in _compare(*ranks).rows if not row.passed] == [
        "correct predictions by dataset type, step 1"
    ]
    ranks[1] = replace(ranks[1], sums=[[32.0], [5.0], [16.0]])
    assert [found.name for found in _compare(*ranks).disagreements] == ["sums over dataset types of step 1"]


def test_ranks_that_disagree_fail() -> None:
    report = _compare(_record(0), _record(1, norm=1.0 + 1e-15, w=W + torch.tensor([0, 0, 0, 1e-15])))
    assert all(row.passed for row in report.rows)
    assert [each.name for each in report.disagreements] == ["gradient norm of step 1", "parameter w", "gradient of w"]
    assert not report.passed
    assert "FAIL, 3 checks failed" in as_text(report)


def test_a_tensor_that_is_missing_fails() -> None:
    ranks = [replace(_record(place), gradients={}) for place in range(2)]
    assert _compare(*ranks).gradients[0].difference == math.inf


def test_the_first_module_to_differ() -> None:
    ranks = [_record(0), _record(1)]
    ranks[1].passes[0].tensors[_output("b")] = W * 2
    ranks[1].passes[0].tensors[_gradient("b")] = W * math.nan
    report = _compare(*ranks)
    assert (report.forward.first, report.forward.last_equal) == ("b", "a")
    assert (report.backward.first, report.backward.last_equal) == ("b", None)
    assert report.passed  # what matters of it would show elsewhere
    assert "first to differ is b" in as_text(report)


def test_a_module_that_cannot_be_compared() -> None:
    ranks = [_record(0), _record(1)]
    ranks[0].passes[0].tensors[_output("b")] = W.view(2, 2)
    trace = _compare(*ranks).forward
    assert trace.compared == ["a"]
    assert trace.first is None


def test_stages_have_a_module_each() -> None:
    """A module is compared where the ranks of one stage have it: here its halves lie on the second."""
    first = replace(_record(), coordinates=RankCoordinates(0, 0, 0), passes=[_pass({"a": W}, {"a": W})])
    second = replace(first, coordinates=RankCoordinates(0, 1, 0))
    halves = [
        replace(_record(), coordinates=RankCoordinates(0, tensor, 1), passes=[_pass({"b": half}, {"b": half})])
        for tensor, half in enumerate(W.split(2))
    ]
    forward = compare(PLAN.config, _record(), [first, second, *halves]).forward
    assert (forward.compared, forward.first) == (["a", "b"], None)
    astray = replace(halves[0], coordinates=RankCoordinates(0, 1, 0))
    forward = compare(PLAN.config, _record(), [first, astray, *halves]).forward
    assert forward.compared == ["b"]
    halves[1].passes[0].tensors[_output("b")] = W[:2]
    forward = compare(PLAN.config, _record(), [first, second, *halves]).forward
    assert (forward.first, forward.last_equal) == ("b", "a")


def test_the_heading_names_the_pipeline() -> None:
    keys = ("parallel.pipeline.size=2", "model.num_chunks=2", "parallel.pipeline.mode=ZBV")
    assert "2 ranks (mtp, pipeline 2 x 2 ZBV; 1 x 3 micro" in heading(make_plan(SMALL, keys, world_size=2))
    keys = ("parallel.pipeline.size=2", "parallel.pipeline.table=own.csv", "parallel.tensor.size=2")
    assert "(mtp, tensor 2, pipeline 2 x 1 1F1B by own.csv; 1" in heading(make_plan(SMALL, keys, world_size=4))


def test_traffic_by_the_formula() -> None:
    config = make_plan(SMALL, world_size=2).config
    (*_, error) = compare_traffic(config, [_record(0), _record(1)]) or []
    assert (error.rank, error.step, error.counted) == (1, 1, Entry())
    record = replace(_record(0), traffic=[{(ParallelMode.EXPERT, "broadcast"): Entry(1, 8)}])
    errors = compare_traffic(config, [record, _record(1)]) or []
    assert "broadcast over expert, step 1, rank 0: expected 0 calls (0 bytes), got 1 (8 bytes)" in map(str, errors)
