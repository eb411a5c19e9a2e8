"""Timelines as text for a terminal: one row per rank, with time running to the right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, ActionType
from internlm.core.scheduler.timeline import Timeline
from internlm.pictures.timeline_labels import (
    ACTION_NAMES,
    Clock,
    Titled,
    action_types,
    choose_clock,
    format_metrics,
    heading,
    label,
    label_legend,
    latest_end,
    longest_label,
    rank_metrics,
    shortest_labelled,
    ticks,
)

#: Backgrounds of cells for even and odd chunks, as indices of the 256-colour palette.
_SHADES: dict[ActionType, tuple[int, int]] = {FORWARD: (74, 153), BACKWARD: (214, 223), WEIGHT: (72, 151)}
_BLACK = 16


class Column(NamedTuple):
    """One character of a row, with its background colour as an index into the 256-colour palette."""

    character: str = " "
    shade: int | None = None


def text(timelines: Sequence[Titled], width: int = 120, coloured: bool = False, seconds: bool = False) -> str:
    """Draw timelines as text, one below the other.

    Args:
        timelines: Timelines with their titles.
        width: Number of characters in a line; longer timelines continue in further lines.
        coloured: Whether to add ANSI colours, which carry no further information.
        seconds: Whether times are in seconds; otherwise they have no unit.
    """
    times = choose_clock(timelines, seconds)
    margin = len(f"rank {max(timeline.table.stage_layout.stages for _, timeline in timelines) - 1}") + 2
    scale, columns = _fitted(timelines, width - margin)
    parts = []
    for title, timeline in timelines:
        rows = [_ruler(latest_end(timelines), scale, times)]
        rows += [_row(timeline, rank, scale, len(rows[0])) for rank in range(len(timeline.spans))]
        names = ["time", *(f"rank {rank}" for rank in range(len(timeline.spans)))]
        parts.append(f"{heading(title, timeline)}; {format_metrics(timeline, times)}")
        for start in range(0, round(timeline.end * scale), columns):
            blocks = (_format_row(row[start : start + columns], coloured) for row in rows)
            parts.append(
                "\n".join(f"{name:{margin}}{block}".rstrip() for name, block in zip(names, blocks, strict=True))
            )
        parts.append(_summary(timeline, times))
    return "\n\n".join([*parts, _legend(timelines, coloured)]) + "\n"


def _fitted(timelines: Sequence[Titled], room: int) -> tuple[float, int]:
    """Return the number of columns per unit of time, chosen so that labels fit, and the number of columns per line.

    The last line may have fewer columns.
    """
    # Prefer a gap of one column between cells. Without room for it, colours or letters separate the cells.
    narrow, shortest = longest_label(timelines), shortest_labelled(timelines)
    for wide in (narrow + 1, narrow):
        scale, columns = wide / shortest, round(latest_end(timelines) * wide / shortest)
        if columns <= room:
            return scale, columns
    # Break after whole cells, with lines of equal length, so that the ranks' rows stay comparable.
    cells = math.ceil(columns / narrow)
    lines = math.ceil(cells / max(1, room // narrow))
    return scale, math.ceil(cells / lines) * narrow


def _row(timeline: Timeline, rank: int, scale: float, columns: int) -> list[Column]:
    row, chunks = [Column()] * columns, timeline.table.stage_layout.chunks
    for span in timeline.spans[rank]:
        start, end = round(span.start * scale), round(span.end * scale)
        shade = _shade(span.action)
        row[start:end] = [Column(character, shade) for character in _cell(label(span.action, chunks), end - start)]
    return row


def _shade(action: Action) -> int:
    return _SHADES[action.type][action.chunk % 2]


def _cell(name: str, wide: int) -> str:
    """Return the characters of a cell, such as ``B3--``.

    Dashes fill the cell after its label, except for the last character, which is a blank unless the label needs it. A
    label that does not fit is cut to its first letter.
    """
    fitted = name if len(name) <= wide else name[0]
    return fitted.ljust(wide - 1, "-").ljust(wide)[:wide]


def _ruler(end: float, scale: float, times: Clock) -> list[Column]:
    row = [Column()] * round(end * scale)
    for time in ticks(end, max(1, len(row) // 12)):
        column = round(time * scale)
        mark = times(time)
        if column + len(mark) <= len(row):
            row[column : column + len(mark)] = map(Column, mark)
    return row


def _format_row(row: Sequence[Column], coloured: bool) -> str:
    # One escape sequence per run of a colour: one per character would multiply the length of the output.
    runs = groupby(row, key=lambda column: column.shade if coloured else None)
    return "".join(_on(shade, "".join(column.character for column in run)) for shade, run in runs)


def _on(shade: int | None, words: str) -> str:
    return words if shade is None else f"\x1b[38;5;{_BLACK};48;5;{shade}m{words}\x1b[0m"


def _summary(timeline: Timeline, times: Clock) -> str:
    lines = [("rank", "busy", "idle", "in flight at most")]
    lines += [
        (str(row.rank), times(row.busy), times(row.idle), str(row.peak_in_flight)) for row in rank_metrics(timeline)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _legend(timelines: Sequence[Titled], coloured: bool) -> str:
    def swatch(action_type: ActionType) -> str:
        return _on(_SHADES[action_type][0] if coloured else None, action_type)

    entries: Iterator[str] = (f"{swatch(found)} {ACTION_NAMES[found]}" for found in action_types(timelines))
    return f"{', '.join(entries)}. {label_legend(timelines)}."
