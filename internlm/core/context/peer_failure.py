"""Failure attribution in a pipeline: find the dead or silent peer when a send or a receive fails.

A rank usually blocks on a neighbour that is itself blocked, so an error that names the neighbour would mislead. Each
rank whose wait fails therefore records in the job's store which peer it waited for, reads the entries of the other
ranks, and follows the chain of waits to its end: the lost peer, which has no entry.
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

#: Maximum time, in seconds, for which a rank waits for the entries of the other ranks.
GRACE_SECONDS = 2.0
#: Peer of a rank that waits for all stages, as in a collective.
ALL = -1


@contextmanager
def attributing_peer_failure(stage: Group, peer: int, operation: str, timeout: timedelta) -> Iterator[None]:
    """Convert the error of a failed wait in the ``with`` block into a ``LostPeerError`` that names the lost peer.

    Args:
        stage: Pipeline group of this rank.
        peer: Pipeline stage that the ``with`` block waits for, or :data:`ALL`.
        operation: Operation that ``peer`` did not complete, such as ``"end the step"``, for the error message.
        timeout: Timeout of the process group. A wait that lasted at least this long indicates a silent peer; a shorter
            wait indicates a dead peer.

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
        return f"pipeline: no dead or silent stage found, perhaps a deadlock: {waiting} ({cause})"
    return f"pipeline stage {ranks.index(lost)} (rank {lost}) is {fate}: {waiting} ({cause})"


def _find_lost_peer(ranks: Sequence[int], rank: int, peer: int, fate: str) -> tuple[int | None, str]:
    """Follow the chain of waits from ``rank`` to a peer without an entry in the store.

    Args:
        ranks: Global ranks of the pipeline.
        rank: Global rank of this process.
        peer: Global rank for which this process waited, or :data:`ALL`.
        fate: State of ``peer`` as observed by this rank, ``"silent"`` or ``"gone"``.

    Returns:
        Global rank of the lost peer, and its fate as observed by the rank that waited for it. The global rank is
        None if no lost peer was found, for example because the waits form a cycle.
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
    # The chain ends at a rank in a collective, which names no peer. A rank that waited for a single peer without an
    # entry names the lost peer directly; if there is none, the lost peer is any rank without an entry.
    seen_by_others = [wait for wait in waits.values() if wait[0] != ALL and wait[0] not in waits]
    without_entry = [(other, fate) for other in ranks if other not in waits]
    return next(iter([*seen_by_others, *without_entry]), (None, fate))


def _exchange_waits(ranks: Sequence[int], rank: int, peer: int, fate: str) -> dict[int, tuple[int, str]]:
    """Store this rank's wait and return the waits of all ranks: (peer waited for, fate of this peer) by rank."""
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
