"""Labels of timelines for all pictures: headings, metrics, action names, units and ticks.

All timelines of a picture share one time axis. Times in seconds are labelled in s, ms or µs. Simulated times without a
unit are labelled with plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, ActionType
from internlm.core.scheduler.timeline import Timeline

#: Title of a timeline (such as "simulated"; may be empty), and the timeline.
Titled = tuple[str, Timeline]

ACTION_NAMES: dict[ActionType, str] = {FORWARD: "forward", BACKWARD: "backward", WEIGHT: "gradient of the weights"}
#: Colours of cells, RGB: blue, orange and green that stay distinct for colour-blind readers (Okabe and Ito 2008).
COLOURS = {FORWARD: (86, 180, 233), BACKWARD: (230, 159, 0), WEIGHT: (0, 158, 115)}
_UNITS = {1.0: "s", 1e-3: "ms", 1e-6: "µs"}


class Clock(NamedTuple):
    """Formatter of times: ``time / unit``, followed by the unit's name."""

    unit: float = 1.0
    name: str = ""

    def __call__(self, time: float, digits: int = 4) -> str:
        """Format ``time`` with ``digits`` significant digits."""
        return f"{time / self.unit:.{digits}g}" + (f" {self.name}" if self.name else "")


def choose_clock(timelines: Sequence[Titled], seconds: bool) -> Clock:
    """Choose the unit of all times in a picture.

    If ``seconds`` is set, the unit is the largest of s, ms and µs that the longest timeline reaches. Otherwise, times
    have no unit.
    """
    if not seconds:
        return Clock()
    end = latest_end(timelines)
    # One unit for all labels of a picture, because readers compare the digits of labels.
    return next((Clock(unit, name) for unit, name in _UNITS.items() if end >= unit), Clock(unit=1e-6, name="µs"))


class RankMetrics(NamedTuple):
    """Busy and idle time of a rank, and its peak number of activations in flight (see :class:`Timeline`)."""

    rank: int
    busy: float
    idle: float
    peak_in_flight: int


def rank_metrics(timeline: Timeline) -> list[RankMetrics]:
    """Return the metrics of each rank, with idle time counted until the last rank ends."""
    rows = []
    for rank, (spans, peak) in enumerate(zip(timeline.spans, timeline.peak_in_flight, strict=True)):
        busy = sum(span.end - span.start for span in spans)
        rows.append(RankMetrics(rank, busy, timeline.end - busy, peak))
    return rows


def heading(title: str, timeline: Timeline) -> str:
    """Return the heading of a timeline: its title, schedule, and numbers of stages, chunks and micro-batches."""
    table, stage_layout = timeline.table, timeline.table.stage_layout
    sizes = [table.schedule, _count(stage_layout.stages, "stage")]
    sizes += [_count(stage_layout.chunks, "chunk") + " each"] if stage_layout.chunks > 1 else []
    words = ", ".join([*sizes, _count(table.micro_batches, "micro-batch")])
    return f"{title}: {words}" if title else words


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") else "s")


def format_metrics(timeline: Timeline, times: Clock) -> str:
    """Format the bubble and the end time of a timeline."""
    # abs, because a measured bubble of zero may be −0.0.
    return f"bubble {100 * abs(timeline.bubble):.1f} %, end {times(timeline.end)}"


def label(action: Action, chunks: int) -> str:
    """Return the label of an action, such as ``F3`` for the forward pass of micro-batch 3.

    In chunk 1, the label is ``f3`` if a rank has two ``chunks``, and ``F3.1`` if it has more.
    """
    if chunks != 2:
        return str(action)
    letter = action.type.lower() if action.chunk else action.type
    return f"{letter}{action.micro_batch}"


def label_legend(timelines: Sequence[Titled]) -> str:
    """Return the legend of the labels, such as ``F3: micro-batch 3``."""
    chunks = max_chunks(timelines)
    if chunks == 1:
        return "F3: micro-batch 3"
    return "F3: micro-batch 3, chunk 0; " + ("f3: chunk 1" if chunks == 2 else "F3.1: chunk 1")


def describe_action(timeline: Timeline, rank: int, action: Action) -> str:
    """Describe an action by type, micro-batch, rank and, if there are several, chunk."""
    stage_layout = timeline.table.stage_layout
    where = f"rank {rank}"
    if stage_layout.chunks > 1:
        where += f", chunk {action.chunk} (virtual stage {stage_layout.virtual(rank, action.chunk)})"
    return f"{ACTION_NAMES[action.type]} of micro-batch {action.micro_batch}, {where}"


def action_types(timelines: Sequence[Titled]) -> list[ActionType]:
    """Return the types of the actions in ``timelines``, in the order of ACTION_NAMES."""
    found = {action.type for _, timeline in timelines for row in timeline.table.actions for action in row}
    return [action_type for action_type in ACTION_NAMES if action_type in found]


def max_chunks(timelines: Sequence[Titled]) -> int:
    """Return the largest number of chunks per rank in ``timelines``."""
    return max(timeline.table.stage_layout.chunks for _, timeline in timelines)


def latest_end(timelines: Sequence[Titled]) -> float:
    """Return the latest end of all timelines, which is the end of the time axis."""
    return max(timeline.end for _, timeline in timelines)


def longest_label(timelines: Sequence[Titled]) -> int:
    """Return the number of characters of the longest label."""
    chunks = max_chunks(timelines)
    rows = (row for _, timeline in timelines for row in timeline.table.actions)
    return max(len(label(action, chunks)) for row in rows for action in row)


def shortest_labelled(timelines: Sequence[Titled]) -> float:
    """Return the duration of the shortest action whose label must fit: at least an eighth of the longest action."""
    # A lower bound, because one very short action, such as a measured outlier, would make the picture too wide.
    rows = (row for _, timeline in timelines for row in timeline.spans)
    lengths = [span.end - span.start for row in rows for span in row if span.end > span.start]
    return max(min(lengths), max(lengths) / 8)


def ticks(end: float, most: int) -> Iterator[float]:
    """Yield the times of the axis ticks: round numbers from 0 to ``end``, at most ``most`` + 1 of them."""
    # Steps of 1, 2 or 5 times a power of ten, which are easy to read.
    least = end / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    yield from (step * index for index in range(math.floor(end / step + 1e-9) + 1))
