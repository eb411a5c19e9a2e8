"""A pipeline changes nothing: whatever the schedule, the cut and the layers' own parallelism, a run is that of one
process, sums taken in another order. The engine is that of ``internlm verify``, the runs are those of
:mod:`tests.dist.pipeline_rows`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from internlm.core.context import global_context as gpc
from internlm.core.scheduler import StepResult
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import write_table
from internlm.core.scheduler.timeline import Costs
from internlm.core.scheduler.validate import simulate
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.verify.record import RankRecord
from tests.dist.oracle import Run, run, verify
from tests.dist.pipeline_rows import CASES, KINDS, ROWS, TENSOR, Place, Row, draw, random_table
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin


def assert_equal(overrides: list[str], ranks: int, function: Run = run) -> list[RankRecord]:
    report, records = verify(ranks, overrides, function=function)
    assert report.failures == []
    for trace in (report.forward, report.backward):
        assert (trace.first, len(trace.compared)) == (None, len(trace.differences))
    return records


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two types of samples, of unequal length; in half of all, no label counts."""
    folder = tmp_path_factory.mktemp("lopsided")
    for name, offset in (("cn", 0), ("en", 7)):
        samples = [[(offset + i * j) % 63 + 1 for j in range(4 + i % 12)] for i in range(40)]
        write_bin(folder / name / "a.bin", [[-t for t in s] if i % 2 else s for i, s in enumerate(samples)])
    return str(folder)


def assert_row(row: Row, seed: int, lopsided: str, folder: Path) -> None:
    overrides = [text.replace("{lopsided}", lopsided) for text in row.overrides]
    table = row.table(seed)
    if row.kind == "own":
        write_table(table, folder / "own.csv")
        overrides.append(f"parallel.pipeline.table={folder / 'own.csv'}")
    records = assert_equal(overrides, row.place.ranks)
    peaks = simulate(table, Costs.uniform(table.stage_layout.virtual_stages)).peak_in_flight
    assert [r.peak_in_flight for r in records] == [peaks[r.coordinates.stage] for r in records]


def _rows() -> Iterator[object]:
    for index, row in enumerate(ROWS):
        name = f"{row.kind}-{row.place.stages}-{row.place.tensor}"
        yield pytest.param(index, id=name, marks=[pytest.mark.wide] if row.wide else [])


@pytest.mark.parametrize("number", list(_rows()))
def test_every_row(number: int, lopsided: str, tmp_path: Path) -> None:
    print(ROWS[number])
    assert_row(ROWS[number], number, lopsided, tmp_path)


def test_the_rows_cover_every_pair() -> None:
    met: set[tuple[str, str, object]] = {(row.kind, what, name) for row in ROWS for what, name in row.cases.items()}
    met |= {(row.kind, field, getattr(row.place, field)) for row in ROWS for field in Place._fields}
    met |= {(row.kind, "chunks", row.chunks) for row in ROWS}
    choices: dict[str, list[object]] = {what: list(names) for what, names in CASES.items()}
    choices |= {"stages": [2, 4, 8], "tensor": list(TENSOR), "data": [1, 2], "zero1": [-1, 1, 2]}
    wanted: set[tuple[str, str, object]] = {
        (kind, what, name) for kind in KINDS for what, names in choices.items() for name in names
    }
    wanted |= {(kind, "chunks", chunks) for kind, sorts in KINDS.items() for _, chunks in sorts}
    assert wanted <= met
    narrow = {(row.kind, what, name) for row in ROWS if not row.wide for what, name in row.cases.items()}
    assert narrow == {(kind, what, name) for kind in KINDS for what, names in CASES.items() for name in names}
    assert all(row.place.ranks <= 8 for row in ROWS)


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.wide)])
def test_a_random_row(count: int, lopsided: str, tmp_path: Path) -> None:
    """Drawn anew in each run, from seeds that are printed."""
    for _ in range(count):
        seed = random.SystemRandom().randrange(10**6)
        print(f"seed {seed}: {draw(seed)}")
        assert_row(draw(seed), seed, lopsided, tmp_path)


@pytest.mark.parametrize(
    ("place", "chunks"),
    [(Place(1, "whole", 2), 2), pytest.param(Place(8, "whole"), 4, marks=pytest.mark.wide)],
    ids=str,
)
def test_the_least_and_the_most_that_is_interleaved(place: Place, chunks: int) -> None:
    """One stage, and thirty-two virtual ones."""
    row = Row("interleaved", "1F1B", chunks, place, {what: next(iter(names)) for what, names in CASES.items()})
    assert_equal(row.overrides, place.ranks)


def _tensors(record: RankRecord) -> Iterator[Tensor]:
    for shards in (record.gradients, record.parameters):
        yield from (values for of_tensor in shards.values() for values in of_tensor.slices.values())


def test_overlap_changes_no_bit() -> None:
    overrides = ("parallel.pipeline.size=2", "model.num_chunks=2", "model.num_layers=4", "data.micro_num=4")
    waiting, going_on = (
        assert_equal([*overrides, f"parallel.pipeline.interleaved_overlap={overlap}"], 2) for overlap in (False, True)
    )
    for one, other in zip(waiting, going_on, strict=True):
        assert (one.losses, one.norms) == (other.losses, other.norms)
        assert all(map(torch.equal, _tensors(one), _tensors(other)))


# -- validation
#: Micro-batches of a training step, and of passes without backward.
MICRO_BATCHES, FEWER = 8, (1, 3, 5)


class Validation(NamedTuple):
    """Some passes without backward, and the loss of the training step after them."""

    results: list[StepResult]
    trained: float


def _validate(rank: int, world_size: int, *configs: list[str]) -> list[Validation]:
    return [_validated(overrides) for overrides in configs]


def _validated(overrides: list[str]) -> Validation:
    gpc.destroy()
    initialize_distributed_env(TINY, overrides=[*overrides, f"data.micro_num={MICRO_BATCHES}"])
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    optimizer, beta2, lr = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr, beta2)
    batch, labels = next(iter(build_train_loader_with_data_type()[0]))
    trainer.eval()
    results = [
        trainer.execute_schedule(
            iter([({key: rows[:count] for key, rows in batch.items()}, labels[:count])]),
            forward_only=True,
            return_output_label=True,
        )
        for count in FEWER
    ]
    assert not any(group.grads.any() for group in optimizer.groups)
    trainer.train()
    trained = trainer.train_step(iter([(batch, labels)])).result.loss
    return Validation(results, trained)


def test_validation(tmp_path: Path) -> None:
    """Forward only, with other numbers of micro-batches than training has, and fewer than there are stages."""
    sorts = sorted({(mode, chunks) for sorts in KINDS.values() for mode, chunks in sorts if chunks <= 2})
    layout = ["parallel.pipeline.size=4", "model.num_layers=8"]
    configs = [[*layout, f"parallel.pipeline.mode={mode}", f"model.num_chunks={chunks}"] for mode, chunks in sorts]
    write_table(random_table(random.Random(0), StageLayout(4), MICRO_BATCHES), tmp_path / "own.csv")
    sorts.append(("1F1B", 1))
    configs.append([*layout, f"parallel.pipeline.table={tmp_path / 'own.csv'}"])
    (((wanted, trained),),) = run_ranks(1, _validate, ["model.num_layers=8"])
    for (mode, _), *validations in zip(sorts, *run_ranks(4, _validate, *configs), strict=True):
        head = 0 if mode == "ZBV" else 3
        for rank, found in enumerate(validations):
            assert found.trained == pytest.approx(trained, rel=1e-12, abs=0)
            for result, reference in zip(found.results, wanted, strict=True):
                assert result.loss == pytest.approx(reference.loss, rel=1e-12, abs=0)
                torch.testing.assert_close(result.sums, reference.sums, rtol=1e-12, atol=0)
                tensors = (reference.outputs, reference.labels) if rank == head else ([], [])
                torch.testing.assert_close((result.outputs, result.labels), tensors, rtol=1e-12, atol=1e-12)


@pytest.mark.wide
def test_validation_where_layers_are_split() -> None:
    modes = zip(("mtp", "fsp", "isp, overlapped"), itertools.cycle(KINDS["own"]), strict=False)
    configs = [
        [
            *TENSOR[tensor][1],
            *("parallel.pipeline.size=2", f"parallel.pipeline.mode={mode}", f"model.num_chunks={chunks}"),
            "model.num_layers=4",
        ]
        for tensor, (mode, chunks) in modes
    ]
    (((wanted, trained),),) = run_ranks(1, _validate, ["model.num_layers=4"])
    for ranks in zip(*run_ranks(4, _validate, *configs), strict=True):
        for found in ranks:
            assert found.trained == pytest.approx(trained, rel=1e-12, abs=0)
            for result, reference in zip(found.results, wanted, strict=True):
                torch.testing.assert_close(result.sums, reference.sums, rtol=1e-12, atol=0)
