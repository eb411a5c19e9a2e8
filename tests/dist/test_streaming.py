"""A run on streamed texts that is killed and resumed, on as many ranks or others, is the straight run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.whole_runs import Outcome, assert_same_tensors, fit, saving
from tests.unit.data.streams import write_streamed

TOTAL = 10


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides by which a run trains on texts of two types, of which it reads several epochs."""
    return [*write_streamed(tmp_path_factory.mktemp("texts")), f"data.total_steps={TOTAL}"]


def assert_straight(parts: list[Outcome], straight: Outcome) -> None:
    assert [entry for part in parts for entry in part.log] == straight.log
    assert_same_tensors(parts[-1].tensors, straight.tensors)
    assert all(map(torch.equal, parts[-1].samples, straight.samples))


def test_killed_and_resumed_twice_is_straight(streaming: list[str], tmp_path: Path) -> None:
    straight = fit(2, streaming)
    keys = saving(tmp_path, *streaming, every=3, total=TOTAL)
    # Killed two steps after a save, whose steps are trained again.
    parts = [fit(2, keys, stop_after=5), fit(2, keys, stop_after=8), fit(2, keys)]
    for part, last in zip(parts, (3, 6, TOTAL), strict=True):
        part.ranks[0].log[:] = [entry for entry in part.log if entry[0] < last]
    assert_straight(parts, straight)


def test_other_ranks_read_the_same_texts(streaming: list[str], tmp_path: Path) -> None:
    straight = fit(1, streaming)
    keys = saving(tmp_path, *streaming, every=3, total=TOTAL)
    parts = [fit(2, keys, stop_after=3), fit(3, keys, stop_after=6), fit(1, keys)]
    losses = [entry[1] for part in parts for entry in part.log]
    torch.testing.assert_close(losses, [entry[1] for entry in straight.log], rtol=1e-10, atol=0)
    assert all(map(torch.equal, parts[-1].samples, straight.samples))


def test_another_number_of_shards_ends_the_run_with_the_key(streaming: list[str], tmp_path: Path) -> None:
    fit(1, saving(tmp_path, *streaming, every=1, total=TOTAL), stop_after=1)
    message = fit(1, saving(tmp_path, *streaming, "data.global_batch=4", every=1, total=TOTAL)).message
    assert message.startswith("data.stream_shards: 2, but the checkpoint was saved with 4. Set data.stream_shards")
