"""An interrupted run is, bit by bit, the run that nobody interrupted."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.dist.whole_runs import Outcome, assert_same_tensors, fit, saving
from tests.unit.data.files import write_bin

TOTAL = 14
#: Rows of an epoch of the small data set; a step takes 4.
ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples that fill 24 rows of 32 tokens: 6 steps an epoch."""
    folder = tmp_path_factory.mktemp("data")
    samples = [[(i * 7 + j * j) % 64 for j in range(8)] for i in range(ROWS * 4)]
    write_bin(folder / "en" / "a.bin", samples)
    return str(folder)


def _overrides(data: str, folder: Path, every: int) -> list[str]:
    schedules = ["lr_scheduler.warmup_ratio=0.5", "adam.adam_beta2_c=0.8"]
    more = [f"data.train_folder={data}", "model.dtype=torch.float32", *schedules]
    return saving(folder, *more, every=every, total=TOTAL)


@functools.cache
def _straight(ranks: int, data: str, folder: Path) -> Outcome:
    return fit(ranks, _overrides(data, folder / f"straight-{ranks}", TOTAL))


@pytest.mark.parametrize(
    "stops",
    [[1], [3], [6], [12], [7, 9, 10]],
    ids=["at step 1", "mid-epoch", "at an epoch's edge", "at the second edge", "three times in one epoch"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_is_straight(ranks: int, stops: list[int], data: str, tmp_path: Path) -> None:
    straight = _straight(ranks, data, Path(data).parent)
    parts = [fit(ranks, _overrides(data, tmp_path, every=stop), stop) for stop in (*stops, TOTAL)]
    for rank, whole in enumerate(straight.ranks):
        assert [entry for part in parts for entry in part.ranks[rank].log] == whole.log
        last = parts[-1].ranks[rank]
        assert (last.state, last.steps) == (whole.state, whole.steps)
        assert_same_tensors(last.streams, whole.streams)
    assert_same_tensors(parts[-1].tensors, straight.tensors)
    assert straight.state["step"] == TOTAL
