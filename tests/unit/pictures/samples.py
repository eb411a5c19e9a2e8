"""Timelines for tests."""

from __future__ import annotations

from dataclasses import replace

from internlm.core.scheduler.table import make_table
from internlm.core.scheduler.timeline import Costs, Span, Timeline
from internlm.core.scheduler.validate import simulate


def simulated(schedule: str, stages: int = 4, chunks: int = 1, micro_batches: int = 8, **costs: float) -> Timeline:
    """A simulated schedule; each action takes one unit of time unless ``costs`` gives another."""
    table = make_table(schedule, stages, chunks, micro_batches)
    return simulate(table, Costs.uniform(table.stage_layout.virtual_stages, **costs))


def slower(timeline: Timeline, factor: float) -> Timeline:
    """As a measurement that takes ``factor`` times as long."""
    rows = (tuple(Span(a, start * factor, end * factor) for a, start, end in row) for row in timeline.spans)
    return replace(timeline, spans=tuple(rows))
