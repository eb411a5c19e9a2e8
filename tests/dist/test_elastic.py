"""A job that is started again with other numbers of processes trains on the same samples, with the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.whole_runs import Outcome, fit, saving

#: Steps of 5 rows, which no number of processes above 1 divides, with dropout.
BATCH = ("data.global_batch=10", "model.drop_rate=0.1")
ROWS = 5
#: On most numbers of processes data parallelism alone; of 4 and 8 processes, two share a row.
ELASTIC = "parallel.elastic=[{'worlds': [4, 8], 'layout': {'tensor.size': 2, 'tensor.mode': 'msp'}}]"


@pytest.mark.parametrize(
    "worlds",
    [(8, 7, 5, 3, 8), pytest.param((4, 3, 2, 4), marks=pytest.mark.wide)],
    ids=lambda worlds: "-".join(map(str, worlds)),
)
def test_worlds_that_change_train_as_one_process(worlds: tuple[int, ...], tmp_path: Path) -> None:
    total = 2 * len(worlds)
    straight = fit(1, [*BATCH, f"data.total_steps={total}"])
    runs: list[Outcome] = []
    for number, world_size in enumerate(worlds, 1):
        overrides = saving(tmp_path, *BATCH, ELASTIC, every=2, total=total)
        runs.append(fit(world_size, overrides, stop_after=2 * number if number < len(worlds) else None))
    log = [entry for run in runs for entry in run.log]
    assert [entry[0] for entry in log] == [entry[0] for entry in straight.log] == list(range(total))
    losses, expected = ([entry[1:3] for entry in of_run] for of_run in (log, straight.log))
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    assert runs[-1].state == straight.state
    assert runs[-1].ranks[0].position[:3] == straight.ranks[0].position[:3] == (total, total, ROWS * total)


def test_ranks_beyond_the_rows_have_padding() -> None:
    """Of four ranks with two micro-batches each, the third has one row of the five, and the fourth has none."""
    one, four = fit(1, BATCH, stop_after=0), fit(4, BATCH, stop_after=0)
    rows = [rank.samples[0].flatten(1).any(1).tolist() for rank in four.ranks]
    assert rows == [[True, True], [True, True], [True, False], [False, False]]
    assert all(torch.equal(one.samples[step], four.samples[step][:ROWS]) for step in range(2))
