"""Any number of ranks and workers, any kills and resumptions: the samples of a step are those of a straight run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.config.schema import DataConfig
from internlm.config.schema.root import WeightChange
from internlm.core.parallel.sharding import GroupPosition
from internlm.data import blend
from internlm.data.batch_plan import START, Position
from internlm.data.build import build_train_loader
from internlm.data.loader import TrainLoader
from tests.unit.data.files import write_bin

SIZES = {"en": 13, "code": 6}
STEPS = 40
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"pack_sample_into_one": True},
    {"pack": "best_fit"},
    {"use_packed_dataset": False},
)
MIXTURES: tuple[dict[str, Any], ...] = (
    {},
    {"weights": {"en": 1, "code": 3}, "weight_changes": (WeightChange(step=9, weights={"en": 1}),)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples of which each has a token of its own; several epochs of them are read."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    tokens = iter(range(1, 100))
    for name, size in SIZES.items():
        write_bin(root / name / "a.bin", [[next(tokens)] * int(random.integers(2, 21)) for _ in range(size)])
    return str(root)


@pytest.fixture(autouse=True, scope="module")
def short_blocks() -> Iterator[None]:
    """Blocks of few samples, as the types have few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "BLOCK", 64)
        yield


def loader(folder: str, rank: int, size: int, **more: Any) -> TrainLoader:
    data = DataConfig(train_folder=folder, seq_len=8, micro_bsz=2, total_steps=STEPS, **more)
    return build_train_loader(data, 100, seed=3, replica=GroupPosition(rank, size))[0]


def rows_of(loaders: list[TrainLoader], first: int, stop: int) -> list[list[list[int]]]:
    """Read steps on all ranks; return the tokens of the rows of each step, without rows of padding."""
    rows: list[list[list[int]]] = [[] for _ in range(first, stop)]
    for made in loaders:
        batches = iter(made)
        for of_step in rows:
            ids = next(batches)[0]["input_ids"].flatten(1)
            of_step += [row.tolist() for row in ids if row.any()]
    return rows


#: Parts of a run: steps until a kill, steps lost by it, ranks, and threads that read ahead.
parts = st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(1, 5), st.sampled_from([0, 1, 3]))


@settings(max_examples=15)
@given(
    layout=st.sampled_from(LAYOUTS),
    mixture=st.sampled_from(MIXTURES),
    batch=st.integers(1, 6),
    rampup=st.sampled_from(["", "2 2 3"]),
    skip=st.sampled_from(["", "2-4,8"]),
    schedule=st.lists(parts, min_size=1, max_size=4),
)
def test_the_samples_of_a_step_are_those_of_a_straight_run(
    folder: str,
    layout: dict[str, Any],
    mixture: dict[str, Any],
    batch: int,
    rampup: str,
    skip: str,
    schedule: list[tuple[int, int, int, int]],
) -> None:
    more = {**layout, **mixture, "global_batch": 2 * batch, "rampup_batch_size": rampup, "skip_batches": skip}
    straight = rows_of([loader(folder, 0, 1, **more, num_worker=0)], 0, 24)
    step, position = 0, START
    for steps, lost, size, workers in schedule:
        ranks = [loader(folder, rank, size, **more, num_worker=workers) for rank in range(size)]
        for made in ranks:
            made.resume(position)
        assert rows_of(ranks, step, step + steps) == straight[step : step + steps]
        saved = max(step, step + steps - lost)
        position = Position(*ranks[0].position(saved)) if saved > step else position
        step = saved


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=["packed", "windows", "best_fit"])
@pytest.mark.parametrize("size", [1, 3])
def test_epochs_have_each_token_once(folder: str, layout: dict[str, Any], size: int) -> None:
    ranks = [loader(folder, rank, size, **layout, global_batch=2, num_worker=0) for rank in range(size)]
    per_epoch = len(ranks[0].dataset)
    counts = []
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        tokens = torch.cat([made.read(step)[0]["input_ids"].flatten() for step in steps for made in ranks])
        counts.append(tokens.bincount(minlength=20)[1:].tolist())
    assert counts[0] == counts[1] == counts[2]
    assert all(counts[0])
