"""Plan of one rank, from the table: its actions, with what it sends and receives around each. Pure.

A table says nothing of transfers: they follow from it. A message from another rank is received into a buffer that must
be posted before it is sent; the rule is: **before the action during which it arrives in the simulation**, with all
actions of one length. This is early enough for a sender that blocks until each of its messages is received (as NCCL and
gloo may, for large ones), and then no schedule that has a simulation can deadlock, whatever the real durations. Proof:
take the action, among those not done, that ends first in the simulation. The actions before it on its rank are done;
its input was sent by an action that ended earlier, so it is here; and the receiver of its output has done all actions
that ended earlier, so the buffer is posted. Hence the action can run.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, Action, Message, Table, input_message, output_message
from internlm.core.scheduler.timeline import Costs, Timeline
from internlm.core.scheduler.validate import simulate


class Receive(NamedTuple):
    """A message from another rank to a chunk of this one."""

    source: int
    message: Message
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """An action of a plan, with the transfers around it."""

    action: Action
    #: Whether a B leaves the gradient of the weights to a W.
    defers_weight: bool
    #: Receives to post before it.
    receives: tuple[Receive, ...]
    #: What it needs, and the rank that sends it.
    input: Message | None
    source: int
    #: What it computes, and the rank that needs it.
    output: Message | None
    target: int


def make_plan(table: Table, rank: int) -> tuple[Step, ...]:
    """Return the steps of ``rank``.

    Raises:
        ScheduleError: Where the table cannot run.
    """
    timeline = simulate(table, Costs.uniform(table.stage_layout.virtual_stages))
    receives = _receives(timeline, rank)
    return tuple(_step(table, rank, action, receives[index]) for index, action in enumerate(table.actions[rank]))


def _step(table: Table, rank: int, action: Action, receives: list[Receive]) -> Step:
    layout = table.stage_layout
    needed, computed = input_message(layout, rank, action), output_message(layout, rank, action)
    return Step(
        action=action,
        defers_weight=action.type == BACKWARD and table.defers_weight(rank, action),
        receives=tuple(receives),
        input=needed,
        source=layout.rank_of(needed.sender) if needed else rank,
        output=computed,
        target=layout.rank_of(computed.virtual) if computed else rank,
    )


def _receives(timeline: Timeline, rank: int) -> list[list[Receive]]:
    """Return for each action of ``rank`` the receives to post before it, in the order of arrival.

    The order matters: the first message of a channel may block both sides until they are connected, which must not
    delay one that comes earlier.
    """
    layout = timeline.table.stage_layout
    ends = [span.end for span in timeline.spans[rank]]
    arrivals: list[tuple[float, Receive]] = []
    for source, spans in enumerate(timeline.spans):
        for span in spans:
            message = output_message(layout, source, span.action)
            if message and source != rank and layout.rank_of(message.virtual) == rank:
                arrivals.append((span.end, Receive(source, message, layout.chunk_of(message.virtual))))
    receives: list[list[Receive]] = [[] for _ in ends]
    for time, receive in sorted(arrivals):
        receives[bisect_left(ends, time)].append(receive)
    return receives
