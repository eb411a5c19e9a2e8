"""Plan of one rank, derived from the action table: its actions, with the sends and receives around each.

A table lists no transfers: they follow from its actions. The receive of a message from another rank is posted **before
the action during which the message arrives in a simulation** in which all actions have the same duration. Then a
schedule whose simulation completes never deadlocks, whatever the real durations, even if a sender blocks until its
message is received (as NCCL and gloo may for large messages). Proof: among the actions that have not run, take the one
that ends first in the simulation. The actions before it on its rank have run. Its input was sent by an action that
ended earlier, so the input has arrived. The receiver of its output has run all actions that ended earlier, so the
receive is posted. Hence the action can run.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, Action, Message, Table, input_message, output_message
from internlm.core.scheduler.timeline import Costs, Timeline
from internlm.core.scheduler.validate import simulate


class Receive(NamedTuple):
    """Receive to post: the sending stage, the message, and the chunk of this rank that takes it as input."""

    source: int
    message: Message
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One action of a plan, with its input, its output and the receives to post before it."""

    action: Action
    #: Whether the action is a B that leaves the weight gradients to a W.
    defers_weight: bool
    #: Receives to post before the action.
    receives: tuple[Receive, ...]
    #: Input of the action (None: no message), and the rank that sends it.
    input: Message | None
    source: int
    #: Output of the action (None: no message), and the rank that receives it.
    output: Message | None
    target: int


def make_plan(table: Table, rank: int) -> tuple[Step, ...]:
    """Return the plan of ``rank``: its steps, in the order of ``table``.

    Raises:
        ScheduleError: ``table`` is incomplete or out of order, or deadlocks.
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
    """Return the receives to post before each action of ``rank``, in the order of arrival.

    The order matters: the first message of a channel may block both ranks until they are connected, which must not
    delay a message that arrives earlier.
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
