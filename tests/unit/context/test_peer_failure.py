"""Whom a rank blames that has waited in vain."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from internlm.core.context import peer_failure
from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.utils.errors import LostPeerError

TIMEOUT = timedelta(seconds=60)
ERROR = RuntimeError("first line\n[gloo] Timed out waiting 60000ms for recv operation to complete\n")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """The job's store, which takes down what other ranks say; of the second pipeline of two, ranks 3, 5 and 7."""
    monkeypatch.setattr(peer_failure, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda handle: [1, 3, 5, 7])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()


def name(other: int, seconds: float = 60.0) -> str:
    """What stage 2 says when ``other`` did not send for so long."""
    stage = Group(ParallelMode.PIPELINE, dist.group.WORLD, rank=2, size=4)
    clock = iter([0.0, seconds])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_failure.time, "monotonic", lambda: next(clock, time.monotonic_ns() / 1e9))
        with (
            pytest.raises(LostPeerError) as caught,
            peer_failure.attributing_peer_failure(stage, other, "send x", TIMEOUT),
        ):
            raise ERROR
    cause = "[gloo] Timed out waiting 60000ms for recv operation to complete"
    assert str(caught.value).endswith(f" ({cause})")
    return str(caught.value).removesuffix(f" ({cause})")


def test_one_that_says_nothing(said: dist.Store) -> None:
    assert name(1) == "pipeline stage 1 (rank 3) is silent: stage 2 (rank 5) waited 60 s for stage 1 to send x"


def test_one_that_ended(said: dist.Store) -> None:
    """The wait for it ends at once."""
    assert name(3, 0.2) == "pipeline stage 3 (rank 7) is gone: stage 2 (rank 5) waited 0 s for stage 3 to send x"


@pytest.mark.parametrize("fate", ["silent", "gone"])
@pytest.mark.parametrize("waited", [0.1, 60.0])
def test_one_that_waited_itself_is_not_to_blame(fate: str, waited: float, said: dist.Store) -> None:
    """Whatever this rank saw of it."""
    said.set("internlm/waited/3", f"1 {fate}")
    text = f"pipeline stage 0 (rank 1) is {fate}: stage 2 (rank 5) waited {waited:.0f} s for stage 1 to send x"
    assert name(1, waited) == text


def test_each_leaves_word(said: dist.Store) -> None:
    name(1)
    assert said.get("internlm/waited/5") == b"3 silent"


@pytest.mark.parametrize("chain", [{3: 5}, {3: 1, 1: 5}, {3: 1, 1: 3}])
def test_a_circle_has_no_culprit(chain: dict[int, int], said: dist.Store) -> None:
    for rank, other in chain.items():
        said.set(f"internlm/waited/{rank}", f"{other} silent")
    waiting = "stage 2 (rank 5) waited 60 s for stage 1 to send x"
    assert name(1) == f"pipeline: no dead or silent stage found, perhaps a deadlock: {waiting}"


@pytest.mark.parametrize("whom", [1, peer_failure.ALL])
def test_of_a_rank_that_waited_for_all_others_know_whom(whom: int, said: dist.Store) -> None:
    """Rank 3, which is stage 1, waited for all; rank 1 for rank 7, which says nothing."""
    said.set("internlm/waited/3", f"{peer_failure.ALL} silent")
    said.set("internlm/waited/1", "7 gone")
    assert name(whom).startswith("pipeline stage 3 (rank 7) is gone: stage 2 (rank 5) waited 60 s for ")


def test_where_all_waited_for_all_it_is_the_one_that_says_nothing(said: dist.Store) -> None:
    for rank in (3, 7):
        said.set(f"internlm/waited/{rank}", f"{peer_failure.ALL} silent")
    message = name(peer_failure.ALL)
    assert message == "pipeline stage 0 (rank 1) is silent: stage 2 (rank 5) waited 60 s for all stages to send x"


def test_other_errors_of_those_who_wait_for_all_are_left_alone() -> None:
    stage = Group(ParallelMode.PIPELINE, dist.group.WORLD, rank=2, size=4)
    with (
        pytest.raises(RuntimeError, match="shape"),
        peer_failure.attributing_peer_failure(stage, peer_failure.ALL, "end", TIMEOUT),
    ):
        raise RuntimeError("shape mismatch")


def test_without_a_store_the_neighbour_is_named(said: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that kept it is gone."""

    def gone() -> dist.Store:
        raise dist.DistNetworkError("failed to connect")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    assert name(1, 0.1).startswith("pipeline stage 1 (rank 3) is gone: stage 2 (rank 5) waited 0 s")
