"""A timeline as a Chrome trace, for https://ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from internlm.core.scheduler.actions import Table, output_message
from internlm.core.scheduler.timeline import Span, Timeline
from internlm.pictures.facts import KINDS, Titled, heading

Event = dict[str, Any]
_MICROSECONDS = 1e6


def chrome_trace(timelines: Sequence[Titled]) -> str:
    """JSON: a process for each pipeline, a thread for each rank, an arrow for each transfer. A unit is a second."""
    events = [event for number, titled in enumerate(timelines) for event in _process(number, *titled)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _process(number: int, title: str, timeline: Timeline) -> Iterator[Event]:
    yield _name("process", number, 0, heading(title, timeline))
    for rank, spans in enumerate(timeline.spans):
        yield _name("thread", number, rank, f"rank {rank}")
        yield from (_complete(number, rank, timeline.table, span) for span in spans)
    yield from _transfers(number, timeline)


def _name(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": f"{what}_name", "pid": process, "tid": thread, "args": {"name": name}}


def _complete(process: int, rank: int, table: Table, span: Span) -> Event:
    action = span.action
    return {
        "ph": "X",
        "name": str(action),
        "cat": KINDS[action.type],
        "pid": process,
        "tid": rank,
        "ts": span.start * _MICROSECONDS,
        "dur": (span.end - span.start) * _MICROSECONDS,
        "args": {
            "kind": KINDS[action.type],
            "micro-batch": action.micro_batch,
            "chunk": action.chunk,
            "virtual stage": table.stage_layout.virtual(rank, action.chunk),
        },
    }


def _transfers(process: int, timeline: Timeline) -> Iterator[Event]:
    """From the end of an action to the start of the one that takes its result."""
    cut = timeline.table.stage_layout
    starts = {(rank, span.action): span.start for rank, row in enumerate(timeline.spans) for span in row}
    sent = (
        (rank, span, output_message(cut, rank, span.action)) for rank, row in enumerate(timeline.spans) for span in row
    )
    for number, (rank, span, message) in enumerate(sent):
        if message is None or (to := cut.rank_of(message.virtual)) == rank:
            continue
        taker = span.action._replace(chunk=cut.chunk_of(message.virtual))
        arrow = {"name": "transfer", "cat": "transfer", "id": f"{process}.{number}", "pid": process}
        yield {**arrow, "ph": "s", "tid": rank, "ts": span.end * _MICROSECONDS}
        yield {**arrow, "ph": "f", "bp": "e", "tid": to, "ts": starts[to, taker] * _MICROSECONDS}
