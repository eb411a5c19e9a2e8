"""Who is to blame when a stage of a pipeline waits in vain.

A rank that waits for one that waits itself would name the wrong one. So each says in the job's store whom it waited
for, and then reads what the others have said: the culprit is one that said nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from internlm.core.context.group import Group
from internlm.utils.errors import LostPeerError, lost_peer

#: Seconds in which others may still say for whom they waited.
GRACE_SECONDS = 2.0
#: Said by a rank that waited for all of them.
ALL = -1


@contextmanager
def attributing_peer_failure(stage: Group, other: int, what: str, timeout: timedelta) -> Iterator[None]:
    """Where the block fails because another rank is gone or silent, raise a :class:`LostPeerError` that names it.

    In the block this rank, one of the ``stage`` group, waits for ``other`` of them, or :data:`ALL`, to do ``what``.
    """
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        own = isinstance(error, (LostPeerError, torch.AcceleratorError))
        if own or (other == ALL and not lost_peer(error)):
            raise  # of a block that waits for one rank all others are that rank's
        raise LostPeerError(_told(stage, other, what, time.monotonic() - start, timeout, error)) from None


def _told(stage: Group, other: int, what: str, waited: float, timeout: timedelta, error: RuntimeError) -> str:
    assert stage.handle is not None
    ranks = dist.get_process_group_ranks(stage.handle)
    fate = "silent" if waited >= timeout.total_seconds() else "gone"
    culprit, fate = _culprit(ranks, ranks[stage.rank], other if other == ALL else ranks[other], fate)
    whom = "all stages" if other == ALL else f"stage {other}"
    waiting = f"stage {stage.rank} (rank {ranks[stage.rank]}) waited {waited:.0f} s for {whom} to {what}"
    if culprit is None:
        return f"pipeline: all stages wait for one another; {waiting} ({_last_line(error)})"
    return f"pipeline stage {ranks.index(culprit)} (rank {culprit}) is {fate}: {waiting} ({_last_line(error)})"


def _culprit(ranks: Sequence[int], rank: int, other: int, fate: str) -> tuple[int | None, str]:
    """One of ``ranks`` that doesn't say for whom it waits, and what became of it: the one at the end of the chain from
    this rank; where that ends at a rank that waited for all, one of which others say that they waited for it. None
    where the chain is a circle."""
    try:
        said = _what_is_said(ranks, rank, other, fate)
    except (dist.DistError, RuntimeError):  # the rank that kept the store is gone
        return (None, fate) if other == ALL else (other, fate)
    seen = {rank}
    while other in said and other not in seen:
        seen.add(other)
        other, fate = said[other]
    if other != ALL:
        return (None if other in seen else other), fate
    named = [each for each in said.values() if each[0] != ALL and each[0] not in said]
    silent = [(each, fate) for each in ranks if each not in said]
    return next(iter([*named, *silent]), (None, fate))


def _what_is_said(ranks: Sequence[int], rank: int, other: int, fate: str) -> dict[int, tuple[int, str]]:
    """Leave this rank's word, and give the others time to leave theirs: by rank, whom it waited for, and what it saw
    of it."""
    store = dist.distributed_c10d._get_default_store()
    store.set(_key(rank), f"{other} {fate}")
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        late = time.monotonic() >= deadline
        words = {each: store.get(_key(each)).decode().split() for each in ranks if store.check([_key(each)])}
        if late or len(words) >= len(ranks) - 1:  # one says nothing any more
            return {each: (int(whom), seen) for each, (whom, seen) in words.items()}
        time.sleep(0.05)


def _key(rank: int) -> str:
    return f"internlm/waited/{rank}"


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1]
