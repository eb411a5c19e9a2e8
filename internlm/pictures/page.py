"""A timeline as a page that needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from internlm.core.scheduler.timeline import Timeline
from internlm.pictures.facts import Clock, Titled, clock, figures, heading, of_ranks
from internlm.pictures.vector import svg

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
    """A page with the picture and a table of what each rank did.

    ``seconds`` says that times are seconds.
    """
    times = clock(timelines, seconds)
    title = escape("; ".join(heading(*titled) for titled in timelines))
    tables = "\n".join(line for titled in timelines for line in _table(*titled, times))
    return _PAGE.format(title=title, picture=svg(timelines, seconds), tables=tables)


def _table(title: str, timeline: Timeline, times: Clock) -> Iterator[str]:
    yield f"<table>\n<caption>{escape(heading(title, timeline))}; {figures(timeline, times)}</caption>"
    yield _line("th", _COLUMNS)
    for row in of_ranks(timeline):
        yield _line("td", (str(row.rank), times(row.busy), times(row.idle), str(row.peak_in_flight)))
    yield "</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
