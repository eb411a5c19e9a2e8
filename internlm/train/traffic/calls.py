"""Calls, as the ledger counts them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.parallel.ledger import Ledger, Traffic

AG, RS, AR, A2A = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
SEND, REDUCE, BROADCAST = "send", "reduce", "broadcast"


class Call(NamedTuple):
    """One collective, and the bytes that a rank sends by it."""

    mode: ParallelMode
    collective: str
    sent: int


class Passes(NamedTuple):
    """What a part of the model sends as it runs forward, and backward."""

    forward: list[Call]
    backward: list[Call]


def calls_of(group: Group, collective: str, whole: int) -> list[Call]:
    """One collective on a tensor of ``whole`` bytes, as a list; of a group of one rank, none."""
    n, passes = group.size, 2 if collective == AR else 1
    return [Call(group.mode, collective, passes * (n - 1) * whole // n)] if n > 1 else []


def together(*parts: Passes) -> Passes:
    """Forward all that is sent forward, and backward likewise."""
    return Passes(*([call for part in parts for call in part[i]] for i in range(2)))


def count_calls(calls: Iterable[Call]) -> Traffic:
    """Calls as the ledger counts them."""
    ledger = Ledger()
    for call in calls:
        ledger.record(*call)
    return ledger.snapshot()
