"""Evaluation: the sums of a loop over single samples, in every layout, under pipelines too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from internlm.core.context import global_context as gpc
from internlm.core.parallel.ledger import LEDGER
from internlm.core.scheduler import Scheduler, TokenCrossEntropy
from internlm.data import build_valid_loader_with_data_type
from internlm.eval.evaluate import Measured, measure
from internlm.initialize import initialize_distributed_env
from internlm.initialize.build_trainer import build_scheduler
from internlm.train import create_model, initialize_model_and_parallel_communicator
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin

#: A number of bytes for each token, so that labels that are counted twice or not at all change the sum.
BYTES = torch.arange(64) % 7
TYPES = {"cn": 5, "code": 1, "en": 9}


def samples_of(name: str) -> list[list[int]]:
    """Samples of a type, some of whose labels are ignored."""
    texts = [[(3 * len(name) + i * j) % 63 + 1 for j in range(3 + 5 * i % 13)] for i in range(TYPES[name])]
    return [[-token if i % 3 == 2 and j % 2 else token for j, token in enumerate(t)] for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three types of 5, 1 and 9 samples."""
    root = tmp_path_factory.mktemp("held_out")
    for name in TYPES:
        write_bin(root / name / "a.bin", samples_of(name))
    return root


@dataclass
class Evaluated:
    """What is evaluated, without an optimizer."""

    model: nn.Module
    scheduler: Scheduler


Result = tuple[Measured, dict[str, Measured]]


def _evaluate(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[Result, int]:
    initialize_distributed_env(TINY, overrides=overrides)
    model, _ = initialize_model_and_parallel_communicator(create_model())
    scheduler = build_scheduler(TokenCrossEntropy(model, gpc.config.loss.label_smoothing), types=1)
    loaders = build_valid_loader_with_data_type()
    before = LEDGER.snapshot()
    result = measure(Evaluated(model, scheduler), loaders, BYTES)
    assert model.training
    return result, sum(entry.calls for entry in LEDGER.since(before).values())


def _loop(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, tuple[float, int, int, int]]:
    """Loss, correct predictions, tokens and bytes by type, one sample after the other."""
    initialize_distributed_env(TINY, overrides=overrides)
    model = create_model().eval()
    found = {}
    for name in TYPES:
        sums = [0.0, 0, 0, 0]
        for sample in samples_of(name):
            ids = torch.tensor([sample])
            with torch.no_grad():
                logits: Tensor = model(ids.abs())[0, :-1]
            labels = ids[0, 1:]
            logits, labels = logits[labels > 0], labels[labels > 0]
            sums[0] += float(functional.cross_entropy(logits, labels, reduction="sum"))
            sums[1] += int((logits.argmax(1) == labels).sum())
            sums[2] += len(labels)
            sums[3] += int(BYTES[labels].sum())
        found[name] = tuple(sums)
    return found


LAYOUT_KEYS = ("parallel.", "model.num_chunks")
LAYOUTS = [
    (2, ("data.valid_micro_num=3",)),
    (2, ("parallel.pipeline.size=2", "data.micro_num=4", "data.valid_micro_num=2")),
]
MORE_LAYOUTS = [
    (1, ("data.valid_micro_num=1",)),
    (1, ("model.num_chunks=2",)),
    (4, ("data.valid_micro_num=5", "parallel.zero1.size=4", "parallel.zero1.fsdp=True")),
    (4, ("parallel.pipeline.size=2", "data.micro_num=4", "data.valid_micro_num=3")),
    (
        2,
        (
            "parallel.pipeline.size=2",
            "data.micro_num=4",
            "model.num_layers=4",
            "model.num_chunks=2",
            "data.valid_micro_num=2",
        ),
    ),
    (2, ("parallel.tensor.size=2", "parallel.tensor.mode=mtp")),
    (2, ("parallel.tensor.size=2", "parallel.tensor.mode=fsp")),
    (4, ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")),
    (4, ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "parallel.pipeline.size=2", "data.micro_num=2")),
]


@pytest.mark.parametrize(
    ("ranks", "overrides"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.wide) for row in MORE_LAYOUTS)]
)
def test_the_figures_are_those_of_single_samples(ranks: int, overrides: tuple[str, ...], folder: Path) -> None:
    keys = (f"data.valid_folder={folder}", "data.use_packed_dataset=False", "loss.label_smoothing=0.1", *overrides)
    (expected,) = run_ranks(1, _loop, tuple(key for key in keys if not key.startswith(LAYOUT_KEYS)))
    results = [result for result, _ in run_ranks(ranks, _evaluate, keys)]
    assert all(result == results[0] for result in results)
    total, by_type = results[0]
    assert list(by_type) == list(TYPES)
    for name, (loss_sum, correct, tokens, size) in expected.items():
        measured = by_type[name]
        assert (measured.correct, measured.tokens, measured.bytes) == (correct, tokens, size)
        assert measured.loss_sum == pytest.approx(loss_sum, rel=1e-12)
        assert measured.perplexity == pytest.approx(math.exp(loss_sum / tokens), rel=1e-12)
        assert measured.bits_per_byte == pytest.approx(loss_sum / math.log(2) / size, rel=1e-12)
    assert (total.tokens, total.bytes) == (sum(x[2] for x in expected.values()), sum(x[3] for x in expected.values()))
    assert total.loss_sum == pytest.approx(sum(x[0] for x in expected.values()), rel=1e-12)


def test_a_type_costs_no_collective(folder: Path, tmp_path: Path) -> None:
    """The same samples as one type, and each as a type of its own, in as many rows."""
    for index in range(16):
        write_bin(tmp_path / "one" / "same" / f"{index:02}.bin", [[index + 1] * 32])
        write_bin(tmp_path / "many" / f"{index:02}" / "a.bin", [[index + 1] * 32])
    calls, totals = [], []
    for name in ("one", "many"):
        results = run_ranks(2, _evaluate, (f"data.valid_folder={tmp_path / name}", "data.valid_micro_num=4"))
        calls.append(results[0][1])
        totals.append(results[0][0][0])
    assert calls[0] == calls[1] > 0
    assert totals[0].tokens == totals[1].tokens
    assert totals[0].loss_sum == pytest.approx(totals[1].loss_sum, rel=1e-12)
