"""An interrupted and resumed run equals the uninterrupted run bit by bit."""

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
    more = [f"data.train_folder={data}", "model.dtype=torch.float32", "model.drop_rate=0.1", *schedules]
    return saving(folder, *more, every=every, total=TOTAL)


@functools.cache
def _straight(ranks: int, data: str, folder: Path) -> Outcome:
    return fit(ranks, _overrides(data, folder / f"straight-{ranks}", TOTAL))


#: Steps at which a run is broken off.
STOPS = {
    "at step 1": [1],
    "mid-epoch": [3],
    "at an epoch's edge": [6],
    "at the second edge": [12],
    "three times in one epoch": [7, 9, 10],
}


@pytest.mark.parametrize("when", STOPS)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.wide), 2])
def test_resumed_is_straight(ranks: int, when: str, data: str, tmp_path: Path) -> None:
    straight = _straight(ranks, data, Path(data).parent)
    parts = [fit(ranks, _overrides(data, tmp_path, every=stop), stop) for stop in (*STOPS[when], TOTAL)]
    for rank, whole in enumerate(straight.ranks):
        assert [entry for part in parts for entry in part.ranks[rank].log] == whole.log
        last = parts[-1].ranks[rank]
        assert (last.state, last.steps) == (whole.state, whole.steps)
        assert_same_tensors(last.streams, whole.streams)
    assert_same_tensors(parts[-1].tensors, straight.tensors)
    assert straight.state["step"] == TOTAL
