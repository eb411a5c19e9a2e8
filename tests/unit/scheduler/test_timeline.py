"""What stages recorded gives back the costs and the timeline that it came from."""

from __future__ import annotations

import pytest

from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.table import make_table
from internlm.core.scheduler.timeline import (
    Costs,
    Record,
    Timeline,
    measured_costs,
    measured_timeline,
    overheads,
)
from internlm.core.scheduler.validate import simulate

SCHEDULES = [("1f1b", 1), ("zbh1", 1), ("interleaved", 2), ("zbv", 2)]
SPENT = 1 / 64  # seconds of overhead after each action


def recorded(timeline: Timeline, start: float = 0.0) -> list[list[Record]]:
    """What ranks that run like ``timeline`` record: each waits from the end of one action to the next."""
    rows = []
    for spans in timeline.spans:
        begins = [0.0, *(span.end for span in spans[:-1])]
        rows.append(
            [
                Record(span.action, *(start + moment for moment in (begin, span.start, span.end, span.end)))
                for begin, span in zip(begins, spans, strict=True)
            ]
        )
    return rows


def costs_of(table: Table, transfer: float) -> Costs:
    """Another for each virtual stage; all can be told exactly in binary."""
    n = table.stage_layout.virtual_stages
    forward = tuple(1 + v / 8 for v in range(n))
    backward = tuple(1 + v / 4 for v in range(n))
    weight = tuple(0.5 if any(a.type == "W" for row in table.actions for a in row) else 0.0 for _ in range(n))
    return Costs(forward, backward, weight, transfer)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_simulated_run_is_measured_as_it_was(schedule: str, chunks: int, stages: int) -> None:
    table = make_table(schedule, stages, chunks, 8)
    timeline = simulate(table, costs_of(table, 0.25 if stages > 1 else 0.0))
    assert measured_costs(table, recorded(timeline)) == timeline.costs
    assert measured_timeline(table, recorded(timeline, start=8.0)) == timeline


def test_costs_are_medians() -> None:
    table = make_table("1f1b", 1, 1, 3)
    rows = recorded(simulate(table, Costs.uniform(1)))
    slow = rows[0][0]
    rows[0][0] = slow._replace(end=slow.end + 100)
    assert measured_costs(table, rows) == Costs((1.0,), (2.0,), (0.0,))


def test_a_message_nobody_waited_for_says_nothing_of_the_wire() -> None:
    """gpipe's second stage waits for the first micro-batch alone; of the gradients the first stage waits for some."""
    table = make_table("gpipe", 2, 1, 4)
    slow_first = Costs((1.0, 4.0), (1.0, 4.0), (0.0, 0.0), 0.5)
    assert measured_costs(table, recorded(simulate(table, slow_first))).transfer == 0.5


def test_overhead_is_what_is_neither_action_nor_transfer() -> None:
    table = make_table("1f1b", 2, 1, 4)
    row = recorded(simulate(table, Costs.uniform(2, transfer=0.25)))[0]
    assert overheads(table, 0, row) == [0.0] * len(row)
    slowed = [
        Record(each.action, *(moment + n * SPENT for moment in each[1:]))  # later than the one before ended
        for n, each in enumerate(row)
    ]
    assert overheads(table, 0, slowed) == [SPENT] * (len(row) - 1) + [0.0]


def test_handing_on_to_another_rank_is_no_overhead_but_to_oneself_it_is() -> None:
    found = {}
    for stages in (1, 2):
        table = make_table("interleaved", stages, 2, 4)
        first = recorded(simulate(table, Costs.uniform(2 * stages)))[0][0]
        found[stages] = overheads(table, 0, [first._replace(sent=first.end + SPENT)])
    assert found == {1: [SPENT], 2: [0.0]}
