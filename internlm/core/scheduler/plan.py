"""From a table to what one rank does: its actions, and what it receives and sends around each. Pure.

Nothing is written down about transfers: they follow from the table. F of virtual stage v needs what F of v − 1 gave, B
of v what B of v + 1 gave. What comes from another rank is received into a buffer that must be offered before; the rule
is: **before the action during which it arrives in the simulation**, with all actions of one length. This is early
enough for a sender that waits until each of its messages is taken, and then no schedule that has a simulation can
deadlock, whatever the real times: take the action, among those not done, that ends first in the simulation. What came
before it on its rank is done; what it needs was sent by an action that ended earlier, so it is here; and whoever shall
take what it sends has done all that ended earlier, so the buffer is there.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, Action, StageLayout, Table
from internlm.core.scheduler.validate import Costs, Timeline, simulate


class Message(NamedTuple):
    """What a virtual stage is given for a micro-batch: by F hidden units, by B their gradient."""

    kind: str
    virtual: int
    micro_batch: int


class Receive(NamedTuple):
    """A message from another rank to a chunk of this one."""

    source: int
    message: Message
    chunk: int


@dataclass(frozen=True)
class Step:
    """An action, and what is around it."""

    action: Action
    #: Whether a B leaves the weights to a W.
    defers_weight: bool
    #: Receives to be begun before it.
    begins: tuple[Receive, ...]
    #: What it needs, and the rank that gives it.
    takes: Message | None
    source: int
    #: What it gives, and the rank that needs it.
    gives: Message | None
    target: int


def plan_of(table: Table, rank: int) -> tuple[Step, ...]:
    """The steps of ``rank``; raises :class:`ScheduleError` where the table is wrong."""
    timeline = simulate(table, Costs.uniform(table.stage_layout.virtual_stages))
    begins = _begins(timeline, rank)
    return tuple(_step(table, rank, action, begins[place]) for place, action in enumerate(table.actions[rank]))


def _step(table: Table, rank: int, action: Action, begins: list[Receive]) -> Step:
    cut = table.stage_layout
    takes, gives = needed_by(cut, rank, action), given_by(cut, rank, action)
    return Step(
        action,
        action.kind == BACKWARD and table.defers_weight(rank, action),
        tuple(begins),
        takes,
        giver_of(cut, takes) if takes else rank,
        gives,
        cut.rank_of(gives.virtual) if gives else rank,
    )


def giver_of(cut: StageLayout, message: Message) -> int:
    """The rank that gives ``message``."""
    return cut.rank_of(message.virtual + (-1 if message.kind == FORWARD else 1))


def needed_by(cut: StageLayout, rank: int, action: Action) -> Message | None:
    """What ``action`` of ``rank`` takes from another virtual stage, if anything."""
    virtual = cut.virtual(rank, action.chunk)
    needs = {FORWARD: virtual > 0, BACKWARD: virtual < cut.virtual_stages - 1}.get(action.kind, False)
    return Message(action.kind, virtual, action.micro_batch) if needs else None


def given_by(cut: StageLayout, rank: int, action: Action) -> Message | None:
    """What it gives to another."""
    virtual = cut.virtual(rank, action.chunk)
    to = {FORWARD: virtual + 1, BACKWARD: virtual - 1}.get(action.kind, -1)
    return Message(action.kind, to, action.micro_batch) if 0 <= to < cut.virtual_stages else None


def _begins(timeline: Timeline, rank: int) -> list[list[Receive]]:
    """What to offer a buffer for before each action of ``rank``, in the order of arrival: the first message of a
    channel may make both sides wait until they are connected, which must not hold up one that comes earlier."""
    cut = timeline.table.stage_layout
    ends = [span.end for span in timeline.spans[rank]]
    arrivals: list[tuple[float, Receive]] = []
    for source, spans in enumerate(timeline.spans):
        for span in spans:
            message = given_by(cut, source, span.action)
            if message and source != rank and cut.rank_of(message.virtual) == rank:
                arrivals.append((span.end, Receive(source, message, cut.chunk_of(message.virtual))))
    begins: list[list[Receive]] = [[] for _ in ends]
    for when, receive in sorted(arrivals):
        begins[bisect_left(ends, when)].append(receive)
    return begins
