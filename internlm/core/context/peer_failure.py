"""Failure attribution in a pipeline: find the dead or silent peer when a send or a receive fails.

A rank usually blocks on a neighbour that is blocked itself, so naming the neighbour would be wrong. Each rank whose
wait fails therefore writes the peer that it waited for to the job's store, then reads the entries of the other ranks
and follows them: the lost peer is at the end of the chain, and has no entry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from internlm.core.context.group import Group
from internlm.utils.errors import LostPeerError, is_peer_failure
from internlm.utils.torch_private import default_store

#: Seconds for which a rank waits for the entries of the other ranks.
GRACE_SECONDS = 2.0
#: Peer in the entry of a rank that waited for all stages, as in a collective.
ALL = -1


@contextmanager
def attributing_peer_failure(stage: Group, peer: int, operation: str, timeout: timedelta) -> Iterator[None]:
    """Turn a failed wait within the block into an error that names the lost peer.

    Args:
        stage: Group of this rank's pipeline.
        peer: Stage for which the block waits, or :data:`ALL`.
        operation: Operation of ``peer`` that did not complete, for the message: ``"send …"``.
        timeout: Timeout of the process group. A wait of this length means a silent peer, a shorter one a dead peer.

    Raises:
        LostPeerError: The wait failed because a rank is dead or silent.
    """
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (LostPeerError, torch.AcceleratorError)):
            raise
        # A wait for a single peer can fail for no other reason; a collective can.
        if peer == ALL and not is_peer_failure(error):
            raise
        raise LostPeerError(_message(stage, peer, operation, time.monotonic() - start, timeout, error)) from None


def _message(stage: Group, peer: int, operation: str, seconds: float, timeout: timedelta, error: RuntimeError) -> str:
    assert stage.handle is not None
    ranks = dist.get_process_group_ranks(stage.handle)
    fate = "silent" if seconds >= timeout.total_seconds() else "gone"
    lost, fate = _find_lost_peer(ranks, ranks[stage.rank], peer if peer == ALL else ranks[peer], fate)
    waited_for = "all stages" if peer == ALL else f"stage {peer}"
    waiting = f"stage {stage.rank} (rank {ranks[stage.rank]}) waited {seconds:.0f} s for {waited_for} to {operation}"
    cause = str(error).strip().splitlines()[-1]
    if lost is None:
        return f"pipeline: all stages wait for one another; {waiting} ({cause})"
    return f"pipeline stage {ranks.index(lost)} (rank {lost}) is {fate}: {waiting} ({cause})"


def _find_lost_peer(ranks: Sequence[int], rank: int, peer: int, fate: str) -> tuple[int | None, str]:
    """Follow the chain of waits from ``rank`` to the peer that left no entry.

    Args:
        ranks: Global ranks of the pipeline.
        rank: Global rank of this process.
        peer: Global rank for which this one waited, or :data:`ALL`.
        fate: State of ``peer`` as seen by this rank, ``"silent"`` or ``"gone"``.

    Returns:
        Global rank of the lost peer (None: the waits form a cycle), and its fate as seen by the rank next to it.
    """
    try:
        waits = _exchange_waits(ranks, rank, peer, fate)
    except (dist.DistError, RuntimeError):  # the rank that hosts the store is gone
        return (None, fate) if peer == ALL else (peer, fate)
    visited = {rank}
    while peer in waits and peer not in visited:
        visited.add(peer)
        peer, fate = waits[peer]
    if peer != ALL:
        return (None if peer in visited else peer), fate
    # The chain ends at a rank in a collective. A rank that waited for a single peer has seen the lost one directly;
    # without such a rank, the lost peer is one that left no entry.
    seen_by_others = [wait for wait in waits.values() if wait[0] != ALL and wait[0] not in waits]
    without_entry = [(other, fate) for other in ranks if other not in waits]
    return next(iter([*seen_by_others, *without_entry]), (None, fate))


def _exchange_waits(ranks: Sequence[int], rank: int, peer: int, fate: str) -> dict[int, tuple[int, str]]:
    """Store this rank's wait and return those of all ranks: rank to (peer that it waited for, fate of the peer)."""
    store = default_store()
    store.set(_key(rank), f"{peer} {fate}")
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        # Read the clock before the store, so that the last read of the store comes after the deadline.
        late = time.monotonic() >= deadline
        entries = {other: store.get(_key(other)).decode().split() for other in ranks if store.check([_key(other)])}
        if late or len(entries) >= len(ranks) - 1:  # the lost peer writes no entry
            return {other: (int(waited_for), seen) for other, (waited_for, seen) in entries.items()}
        # The store cannot wait for any one of several keys.
        time.sleep(0.05)


def _key(rank: int) -> str:
    return f"internlm/waited/{rank}"
