"""Timelines as Chrome traces, for https://ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from internlm.core.scheduler.actions import Table, output_message
from internlm.core.scheduler.timeline import Span, Timeline
from internlm.pictures.timeline_labels import ACTION_NAMES, Titled, heading

Event = dict[str, Any]
_MICROSECONDS = 1e6


def chrome_trace(timelines: Sequence[Titled]) -> str:
    """Return a Chrome trace as JSON: a process per timeline, a thread per rank and an arrow per transfer.

    Args:
        timelines: Timelines with their titles; times are read as seconds.
    """
    # Viewers sort processes by index, so a simulation is shown above its measurement.
    events = [event for index, titled in enumerate(timelines) for event in _process(index, *titled)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _process(process: int, title: str, timeline: Timeline) -> Iterator[Event]:
    yield _metadata("process", process, 0, heading(title, timeline))
    for rank, spans in enumerate(timeline.spans):
        yield _metadata("thread", process, rank, f"rank {rank}")
        yield from (_complete(process, rank, timeline.table, span) for span in spans)
    yield from _transfers(process, timeline)


def _metadata(named: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": f"{named}_name", "pid": process, "tid": thread, "args": {"name": name}}


def _complete(process: int, rank: int, table: Table, span: Span) -> Event:
    action = span.action
    return {
        "ph": "X",
        "name": str(action),
        "cat": ACTION_NAMES[action.type],
        "pid": process,
        "tid": rank,
        "ts": span.start * _MICROSECONDS,
        "dur": (span.end - span.start) * _MICROSECONDS,
        "args": {
            "type": ACTION_NAMES[action.type],
            "micro-batch": action.micro_batch,
            "chunk": action.chunk,
            "virtual stage": table.stage_layout.virtual(rank, action.chunk),
        },
    }


def _transfers(process: int, timeline: Timeline) -> Iterator[Event]:
    """Yield two flow events per transfer: the end of the sending action, and the start of the receiving one."""
    layout = timeline.table.stage_layout
    starts = {(rank, span.action): span.start for rank, row in enumerate(timeline.spans) for span in row}
    sent = (
        (rank, span, output_message(layout, rank, span.action))
        for rank, row in enumerate(timeline.spans)
        for span in row
    )
    for index, (rank, span, message) in enumerate(sent):
        if message is None or (to := layout.rank_of(message.virtual)) == rank:
            continue
        receiver = span.action._replace(chunk=layout.chunk_of(message.virtual))
        arrow = {"name": "transfer", "cat": "transfer", "id": f"{process}.{index}", "pid": process}
        # A flow event binds to a slice by its timestamp: "s" to the slice that ends there, and "f" with bp = e to the
        # slice that starts there.
        yield {**arrow, "ph": "s", "tid": rank, "ts": span.end * _MICROSECONDS}
        yield {**arrow, "ph": "f", "bp": "e", "tid": to, "ts": starts[to, receiver] * _MICROSECONDS}
