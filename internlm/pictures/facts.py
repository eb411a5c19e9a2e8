"""What every picture of a timeline says, however it is drawn. Pure.

Timelines are drawn on one axis of time, so all that go into a picture are in one unit: that of the costs, or seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, ActionType
from internlm.core.scheduler.timeline import Timeline

#: A timeline and what it is, such as "simulated"; an empty title says nothing.
Titled = tuple[str, Timeline]

KINDS: dict[ActionType, str] = {FORWARD: "forward", BACKWARD: "backward", WEIGHT: "gradient of the weights"}
#: Of cells: blue, orange and green that are told apart with every common colour blindness (Okabe and Ito).
COLOURS = {FORWARD: (86, 180, 233), BACKWARD: (230, 159, 0), WEIGHT: (0, 158, 115)}
_UNITS = {1.0: "s", 1e-3: "ms", 1e-6: "µs"}


class Clock(NamedTuple):
    """How times are written: ``time / unit``, and the unit's name after it."""

    unit: float = 1.0
    name: str = ""

    def __call__(self, time: float, digits: int = 4) -> str:
        return f"{time / self.unit:.{digits}g}" + (f" {self.name}" if self.name else "")


def clock(timelines: Sequence[Titled], seconds: bool) -> Clock:
    """One for timelines in ``seconds``, in the largest unit of which the longest lasts one; else times as they are."""
    if not seconds:
        return Clock()
    end = end_of_all(timelines)
    return next((Clock(unit, name) for unit, name in _UNITS.items() if end >= unit), Clock(unit=1e-6, name="µs"))


class OfRank(NamedTuple):
    """The time of a rank, and how many activations it holds at most."""

    rank: int
    busy: float
    idle: float
    peak_in_flight: int


def of_ranks(timeline: Timeline) -> list[OfRank]:
    """What each rank did until the last one ended."""
    rows = []
    for rank, (spans, peak) in enumerate(zip(timeline.spans, timeline.peak_in_flight, strict=True)):
        busy = sum(span.end - span.start for span in spans)
        rows.append(OfRank(rank, busy, timeline.end - busy, peak))
    return rows


def heading(title: str, timeline: Timeline) -> str:
    """Title, kind and sizes."""
    table, stage_layout = timeline.table, timeline.table.stage_layout
    sizes = [table.schedule, _count(stage_layout.stages, "stage")]
    sizes += [_count(stage_layout.chunks, "chunk") + " each"] if stage_layout.chunks > 1 else []
    words = ", ".join([*sizes, _count(table.micro_batches, "micro-batch")])
    return f"{title}: {words}" if title else words


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")


def figures(timeline: Timeline, times: Clock) -> str:
    """Bubble and makespan."""
    return f"bubble {100 * abs(timeline.bubble):.1f} %, end {times(timeline.end)}"


def label(action: Action, chunks: int) -> str:
    """``F3``; in small letters for the second of two chunks, ``F3.1`` where there are more."""
    if chunks != 2:
        return str(action)
    kind = action.type.lower() if action.chunk else action.type
    return f"{kind}{action.micro_batch}"


def how_to_read(timelines: Sequence[Titled]) -> str:
    """What a label says."""
    chunks = chunks_of_all(timelines)
    if chunks == 1:
        return "F3: micro-batch 3"
    return "F3: micro-batch 3, chunk 0; " + ("f3: chunk 1" if chunks == 2 else "F3.1: chunk 1")


def sentence(timeline: Timeline, rank: int, action: Action) -> str:
    """The action in words."""
    stage_layout = timeline.table.stage_layout
    where = f"rank {rank}"
    if stage_layout.chunks > 1:
        where += f", chunk {action.chunk} (virtual stage {stage_layout.virtual(rank, action.chunk)})"
    return f"{KINDS[action.type]} of micro-batch {action.micro_batch}, {where}"


def kinds_of_all(timelines: Sequence[Titled]) -> list[ActionType]:
    """The kinds of action that there are, as KINDS has them."""
    found = {action.type for _, timeline in timelines for row in timeline.table.actions for action in row}
    return [kind for kind in KINDS if kind in found]


def chunks_of_all(timelines: Sequence[Titled]) -> int:
    """The most chunks of a rank."""
    return max(timeline.table.stage_layout.chunks for _, timeline in timelines)


def end_of_all(timelines: Sequence[Titled]) -> float:
    """When the axis of time ends."""
    return max(timeline.end for _, timeline in timelines)


def longest_label(timelines: Sequence[Titled]) -> int:
    """Letters of the longest label."""
    chunks = chunks_of_all(timelines)
    rows = (row for _, timeline in timelines for row in timeline.table.actions)
    return max(len(label(action, chunks)) for row in rows for action in row)


def shortest_labelled(timelines: Sequence[Titled]) -> float:
    """The duration from which on a label has to fit: the shortest, but for actions that are short beside others."""
    rows = (row for _, timeline in timelines for row in timeline.spans)
    lengths = [span.end - span.start for row in rows for span in row if span.end > span.start]
    return max(min(lengths), max(lengths) / 8)


def ticks(end: float, most: int) -> Iterator[float]:
    """At most ``most`` + 1 round times, from 0 to ``end``."""
    least = end / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * share for share in (1, 2, 5, 10) if power * share >= least)
    yield from (step * number for number in range(math.floor(end / step + 1e-9) + 1))
