"""Timelines as SVG pictures, and as self-contained HTML pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from internlm.core.scheduler.actions import Action
from internlm.core.scheduler.timeline import Span, Timeline
from internlm.pictures.timeline_labels import (
    ACTION_NAMES,
    COLOURS,
    Clock,
    Titled,
    action_types,
    choose_clock,
    describe_action,
    format_metrics,
    heading,
    label,
    label_legend,
    latest_end,
    longest_label,
    max_chunks,
    rank_metrics,
    shortest_labelled,
    ticks,
)

# Browsers and viewers are slow with very wide pictures, so a long schedule drops labels instead.
NARROWEST, WIDEST = 960, 20_000  # px: width of the picture
EDGE, LEFT, RIGHT = 20, 56, 84  # px: margin of the picture; names of ranks; peaks of ranks
HEAD, PITCH, TALL, GAP = 46, 30, 26, 16  # px: heading; distance between ranks; cell; gap between timelines
AXIS, LEGEND = 36, 44  # px
LETTER, TICK = 7.2, 80  # px: letter of a cell; minimum distance between two ticks
DARK, GREY, LINE, IDLE = "#111827", "#6b7280", "#9ca3af", "#eef0f3"
_FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" \
height="{height:g}" role="img" font-family="Helvetica, Arial, sans-serif" font-size="13">
<title>{title}</title>
<rect x="1" y="1" width="{inner:g}" height="{low:g}" rx="12" fill="#ffffff" stroke="#d1d5db"/>"""


class Paper(NamedTuple):
    """Horizontal scale of the picture, which all timelines share."""

    times: Clock
    end: float
    width: float  # px
    chunks: int

    def x(self, time: float) -> float:
        """Return the horizontal position of ``time`` in px."""
        return EDGE + LEFT + (self.width - 2 * EDGE - LEFT - RIGHT) * time / self.end


def svg(timelines: Sequence[Titled], seconds: bool = False) -> str:
    """Draw timelines as SVG, one below the other, with a tooltip for each action.

    The picture is as wide as its labels need, within limits.

    Args:
        timelines: Timelines with their titles.
        seconds: Whether times are in seconds; otherwise they have no unit.
    """
    width = min(max(NARROWEST, _legible(timelines)), WIDEST)
    paper = Paper(choose_clock(timelines, seconds), latest_end(timelines), width, max_chunks(timelines))
    parts: list[str] = []
    y = EDGE
    for title, timeline in timelines:
        parts += _panel(paper, y, title, timeline)
        y += HEAD + PITCH * len(timeline.spans) + GAP
    parts += [*_axis(paper, y - GAP), *_legend(paper, y - GAP + AXIS, timelines)]
    height = y - GAP + AXIS + LEGEND
    # Screen readers read the title aloud, and browsers show it as the tooltip of the whole picture.
    title = escape("; ".join(heading(*titled) for titled in timelines))
    frame = _FRAME.format(width=width, height=height, title=title, inner=width - 2, low=height - 2)
    return "\n".join([frame, *parts, "</svg>", ""])


def _legible(timelines: Sequence[Titled]) -> float:
    """Return the width in px at which all labels of a picture fit."""
    cells = latest_end(timelines) / shortest_labelled(timelines)
    return math.ceil(2 * EDGE + LEFT + RIGHT + cells * (LETTER * longest_label(timelines) + 4))


def _panel(paper: Paper, y: float, title: str, timeline: Timeline) -> Iterator[str]:
    """Draw a timeline: its heading, and a row for each rank."""
    right = paper.width - EDGE
    yield _text(EDGE, y + 12, heading(title, timeline), "bold", size=15)
    yield _text(right, y + 12, format_metrics(timeline, paper.times), anchor="end")
    yield _text(right, y + HEAD - 8, "in flight, at most", colour=GREY, anchor="end", size=11)
    for rank, (spans, peak) in enumerate(zip(timeline.spans, timeline.peak_in_flight, strict=True)):
        top = y + HEAD + PITCH * rank
        yield _text(EDGE, top + 18, f"rank {rank}")
        yield _text(right, top + 18, str(peak), anchor="end")
        # The background of a row has the colour of idle time, so the bubble is the part that no cell covers.
        yield _rect(paper.x(0), top, paper.x(timeline.end) - paper.x(0), IDLE)
        yield '<g font-size="11" text-anchor="middle" stroke-width="1">'
        yield from (_cell(paper, top, timeline, rank, span) for span in spans)
        yield "</g>"


def _cell(paper: Paper, y: float, timeline: Timeline, rank: int, span: Span) -> str:
    action, (start, end) = span.action, (paper.x(span.start), paper.x(span.end))
    when = f"{paper.times(span.start)} to {paper.times(span.end)} (takes {paper.times(span.end - span.start)})"
    title = f"<title>{action}: {escape(describe_action(timeline, rank, action))}; {when}</title>"
    # A cell too narrow for its label shows only the micro-batch, or nothing; the tooltip has the whole label.
    names = (label(action, paper.chunks), str(action.micro_batch))
    name = next((name for name in names if LETTER * len(name) + 2 <= end - start), "")
    words = f'<text x="{_px((start + end) / 2)}" y="{_px(y + 17)}" fill="{DARK}">{name}</text>' if name else ""
    body = _rect(start, y, end - start, _colour(action, paper.chunks), ' stroke="#ffffff"')
    return f'<g class="action">{title}{body}{words}</g>'


def _axis(paper: Paper, y: float) -> Iterator[str]:
    """Draw the time axis, which all timelines share."""
    start, end = paper.x(0), paper.x(paper.end)
    marks = list(ticks(paper.end, max(1, int((end - start) / TICK))))
    path = f"M{_px(start)},{y} H{_px(end)}" + "".join(f" M{_px(paper.x(time))},{y} v5" for time in marks)
    yield f'<path d="{path}" fill="none" stroke="{LINE}"/>'
    yield _text(EDGE, y + 18, "time", colour=GREY, size=11)
    yield from (
        _text(paper.x(time), y + 18, paper.times(time), colour=GREY, anchor="middle", size=11) for time in marks
    )


def _legend(paper: Paper, y: float, timelines: Sequence[Titled]) -> Iterator[str]:
    """Draw the legend of colours and labels."""
    x = float(EDGE)
    for action_type in action_types(timelines):
        for chunk in range(paper.chunks):
            yield _rect(x, y - 4, TALL, _colour(Action(action_type, 0, chunk), paper.chunks))
            yield _text(
                x + TALL / 2, y + 13, label(Action(action_type, 0, chunk), paper.chunks)[0], anchor="middle", size=11
            )
            x += TALL + 3
        yield _text(x + 5, y + 13, ACTION_NAMES[action_type])
        x += 7.2 * len(ACTION_NAMES[action_type]) + 24
    yield _text(paper.width - EDGE, y + 13, label_legend(timelines), colour=GREY, anchor="end")


def _colour(action: Action, chunks: int) -> str:
    """Return the colour of the action's type, mixed with white for later chunks, as ``#rrggbb``."""
    # One hue for all chunks, because the type of action matters most; mixing in white keeps black text legible.
    white = 0.6 * action.chunk / max(1, chunks - 1)
    return "#" + "".join(f"{round(level + (255 - level) * white):02x}" for level in COLOURS[action.type])


def _rect(x: float, y: float, wide: float, fill: str, more: str = "") -> str:
    return f'<rect x="{_px(x)}" y="{_px(y)}" width="{_px(wide)}" height="{TALL}" fill="{fill}"{more}/>'


def _text(
    x: float, y: float, words: str, weight: str = "normal", colour: str = DARK, anchor: str = "start", size: int = 13
) -> str:
    style = f'font-weight="{weight}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text x="{_px(x)}" y="{_px(y)}" {style}>{escape(words)}</text>'


def _px(length: float) -> str:
    # Two decimals keep committed pictures small, and equal on all platforms.
    return f"{length:.2f}".rstrip("0").rstrip(".")


# -- HTML -------------------------------------------------------------------------------------------------------------
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: Helvetica, Arial, sans-serif; color: #111827; margin: 24px; }}
.wide {{ overflow-x: auto; }}
.action:hover rect {{ stroke: #111827; stroke-width: 2; }}
table {{ border-collapse: collapse; margin: 20px 0; font-size: 14px; }}
caption {{ text-align: left; font-weight: bold; padding-bottom: 6px; }}
th, td {{ text-align: right; padding: 4px 16px 4px 0; border-bottom: 1px solid #d1d5db; }}
</style>
</head>
<body>
<div class="wide">
{picture}</div>
{tables}
</body>
</html>
"""
_COLUMNS = ("rank", "busy", "idle", "in flight, at most")


def html(timelines: Sequence[Titled], seconds: bool = False) -> str:
    """Return an HTML page with the picture of :func:`svg` and a table of each rank's metrics.

    Args:
        timelines: Timelines with their titles.
        seconds: Whether times are in seconds; otherwise they have no unit.
    """
    times = choose_clock(timelines, seconds)
    title = escape("; ".join(heading(*titled) for titled in timelines))
    tables = "\n".join(line for titled in timelines for line in _table(*titled, times))
    return _PAGE.format(title=title, picture=svg(timelines, seconds), tables=tables)


def _table(title: str, timeline: Timeline, times: Clock) -> Iterator[str]:
    yield f"<table>\n<caption>{escape(heading(title, timeline))}; {format_metrics(timeline, times)}</caption>"
    yield _line("th", _COLUMNS)
    for row in rank_metrics(timeline):
        yield _line("td", (str(row.rank), times(row.busy), times(row.idle), str(row.peak_in_flight)))
    yield "</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
