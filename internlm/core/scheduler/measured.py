"""A real step beside the simulated one: what the stages recorded → their timeline, and the costs that they show. Pure.

All stages' clocks count from one moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Table
from internlm.core.scheduler.executor import Record
from internlm.core.scheduler.plan import Message, given_by, giver_of, needed_by
from internlm.core.scheduler.validate import Costs, Span, Timeline, peak_in_flight

Records = Sequence[Sequence[Record]]


def measured_timeline(table: Table, records: Records) -> Timeline:
    """``records``: of each stage, in seconds; the first that begins, begins at 0. An action starts when what it needed
    was there."""
    zero = min(row[0].begin for row in records)
    spans = tuple(tuple(Span(each.action, each.ready - zero, each.end - zero) for each in row) for row in records)
    peaks = tuple(peak_in_flight(table, rank) for rank in range(table.stage_layout.stages))
    return Timeline(table, measured_costs(table, records), spans, peaks)


def measured_costs(table: Table, records: Records) -> Costs:
    """Medians by virtual stage. A B that does the work of a W too counts for both."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for rank, row in enumerate(records):
        for each in row:
            virtual = table.stage_layout.virtual(rank, each.action.chunk)
            seconds[each.action.kind, virtual].append(each.end - each.ready)

    def of(kind: str) -> tuple[float, ...]:
        return tuple(median(seconds.get((kind, v), [0.0])) for v in range(table.stage_layout.virtual_stages))

    return Costs(of(FORWARD), of(BACKWARD), of(WEIGHT), median([*_transfers(table, records)] or [0.0]))


def _transfers(table: Table, records: Records) -> Iterator[float]:
    """Seconds from the end of an action to the moment when what it gave was there, where another rank waited for it."""
    ends = {message: (rank, record) for rank, message, record in _given(table, records)}
    for rank, row in enumerate(records):
        for each in row:
            message = needed_by(table.stage_layout, rank, each.action)
            source, giver = ends.get(message, (rank, each)) if message else (rank, each)
            if source != rank and each.begin < giver.end:
                yield each.ready - giver.end


def _given(table: Table, records: Records) -> Iterator[tuple[int, Message, Record]]:
    for rank, row in enumerate(records):
        for each in row:
            message = given_by(table.stage_layout, rank, each.action)
            if message:
                yield rank, message, each


def counted_from(records: Sequence[Record], start: float) -> list[Record]:
    """``records`` with their clock set to 0 at ``start``."""
    return [Record(each.action, *(moment - start for moment in each[1:])) for each in records]


def overheads(table: Table, rank: int, records: Sequence[Record]) -> list[float]:
    """For each action of ``rank`` the seconds, up to the next one, that went into neither the action nor a transfer."""
    cut, following = table.stage_layout, [*(each.begin for each in records[1:]), records[-1].sent]
    spent = []
    for each, then in zip(records, following, strict=True):
        takes, gives = needed_by(cut, rank, each.action), given_by(cut, rank, each.action)
        received = each.ready - each.begin if takes and giver_of(cut, takes) != rank else 0.0
        sent = each.sent - each.end if gives and cut.rank_of(gives.virtual) != rank else 0.0
        spent.append(then - each.begin - received - (each.end - each.ready) - sent)
    return spent
