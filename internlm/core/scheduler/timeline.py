"""Timelines of a schedule: costs, starts and ends of its actions, simulated or measured.

A simulation (:mod:`internlm.core.scheduler.validate`) and the records of a real step both result in a
:class:`Timeline`, so that they can be drawn and compared on one time axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeAlias

from internlm.core.scheduler.actions import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Action,
    ActionType,
    Message,
    Table,
    input_message,
    output_message,
)


@dataclass(frozen=True)
class Costs:
    """Durations of actions by virtual stage, and of transfers, all in one unit of time."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]  # without the gradient of the weights
    weight: tuple[float, ...]
    transfer: float = 0.0  # between two ranks; chunks of one rank need no transfer

    @classmethod
    def uniform(
        cls,
        virtual_stages: int,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        transfer: float = 0.0,
    ) -> Costs:
        """Return equal costs for every virtual stage."""
        n = virtual_stages
        return cls((forward,) * n, (backward,) * n, (weight,) * n, transfer)

    def of(self, table: Table, rank: int, action: Action) -> float:
        """Return the duration of ``action`` on ``rank``; B includes the weight gradients unless a W computes them."""
        virtual = table.stage_layout.virtual(rank, action.chunk)
        if action.type == FORWARD:
            return self.forward[virtual]
        if action.type == WEIGHT:
            return self.weight[virtual]
        deferred = table.defers_weight(rank, action)
        return self.backward[virtual] + (0 if deferred else self.weight[virtual])


class Span(NamedTuple):
    """Start and end of an action, in the unit of the timeline's costs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Start and end of every action of a pipeline schedule, simulated or measured."""

    table: Table
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]  # by rank
    #: Peak number of activations in flight, by rank. The unit is the activations of one chunk and micro-batch, which
    #: live from the start of F to the end of the last backward action: W, or B without a W.
    peak_in_flight: tuple[int, ...]

    @property
    def end(self) -> float:
        """Makespan: time from 0, the start of the timeline, to the end of the last action."""
        return max(row[-1].end for row in self.spans)

    @property
    def bubble(self) -> float:
        """Bubble fraction, 0 to 1: share of the makespan for which a rank is idle, averaged over ranks."""
        busy = sum(span.end - span.start for row in self.spans for span in row)
        return 1 - busy / (len(self.spans) * self.end)


def peak_in_flight(table: Table, rank: int) -> int:
    """Return the largest number of (chunk, micro-batch) pairs whose activations ``rank`` stores at once.

    A rank runs one action at a time, so the peak depends on the order of its actions, not on their durations.
    """
    in_flight = peak = 0
    for action in table.actions[rank]:
        if action.type == FORWARD:
            in_flight += 1
            peak = max(peak, in_flight)
        elif action.type == WEIGHT or not table.defers_weight(rank, action):
            in_flight -= 1
    return peak


# -- measured ---------------------------------------------------------------------------------------------------------
class Record(NamedTuple):
    """Times of one executed action, in seconds since a moment that is the same on all ranks.

    The rank waited for the action's input from ``begin`` to ``ready``, computed until ``end`` and sent the output until
    ``sent``.
    """

    action: Action
    begin: float
    ready: float
    end: float
    sent: float


Records: TypeAlias = Sequence[Sequence[Record]]  # by rank; all times count from the same moment


def measured_timeline(table: Table, records: Records) -> Timeline:
    """Return the timeline of a real step, in seconds.

    An action starts when its input is ready. Time 0 is the earliest ``begin`` of any rank.
    """
    zero = min(row[0].begin for row in records)
    spans = tuple(
        tuple(Span(record.action, record.ready - zero, record.end - zero) for record in row) for row in records
    )
    peaks = tuple(peak_in_flight(table, rank) for rank in range(table.stage_layout.stages))
    return Timeline(table, measured_costs(table, records), spans, peaks)


def measured_costs(table: Table, records: Records) -> Costs:
    """Return the median durations of the actions and transfers of a real step, in seconds.

    Actions are grouped by type and virtual stage. The duration of B includes the weight gradients unless a W computes
    them.
    """
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for rank, row in enumerate(records):
        for record in row:
            virtual = table.stage_layout.virtual(rank, record.action.chunk)
            seconds[record.action.type, virtual].append(record.end - record.ready)

    def medians(action_type: ActionType) -> tuple[float, ...]:
        stages = range(table.stage_layout.virtual_stages)
        return tuple(median(seconds.get((action_type, virtual), [0.0])) for virtual in stages)

    transfer = median([*_transfers(table, records)] or [0.0])
    return Costs(medians(FORWARD), medians(BACKWARD), medians(WEIGHT), transfer)


def _transfers(table: Table, records: Records) -> Iterator[float]:
    """Yield the durations, in seconds, of the transfers for which the receiver waited.

    If the receiver did not wait, the time from the end of the sender's action to the use of the message is longer than
    the transfer.
    """
    senders: dict[Message, tuple[int, Record]] = {}
    for rank, row in enumerate(records):
        for record in row:
            if message := output_message(table.stage_layout, rank, record.action):
                senders[message] = rank, record
    for rank, row in enumerate(records):
        for record in row:
            message = input_message(table.stage_layout, rank, record.action)
            if message is None or message not in senders:
                continue
            source, sent = senders[message]
            if source != rank and record.begin < sent.end:
                yield record.ready - sent.end


def overheads(table: Table, rank: int, records: Sequence[Record]) -> list[float]:
    """Return the overhead of each action of ``rank``, in seconds.

    The overhead is the time between the ``begin`` of an action and that of the next one, minus compute and transfers.
    """
    layout, next_begins = table.stage_layout, [*(record.begin for record in records[1:]), records[-1].sent]
    spent = []
    for record, next_begin in zip(records, next_begins, strict=True):
        needed, computed = input_message(layout, rank, record.action), output_message(layout, rank, record.action)
        received = record.ready - record.begin if needed and layout.rank_of(needed.sender) != rank else 0.0
        sent = record.sent - record.end if computed and layout.rank_of(computed.virtual) != rank else 0.0
        spent.append(next_begin - record.begin - received - (record.end - record.ready) - sent)
    return spent
