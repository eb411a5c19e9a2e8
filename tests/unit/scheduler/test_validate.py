"""What can run, what can't, and when everything happens."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.core.scheduler.actions import Action, Table
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import make_table
from internlm.core.scheduler.timeline import Costs, Span, Timeline
from internlm.core.scheduler.validate import ScheduleError, problems, simulate

Key = tuple[int, Action]  # rank, action


def act(text: str) -> Action:
    micro_batch, _, chunk = text[1:].partition(".")
    return Action(text[0], int(micro_batch), int(chunk or 0))


def table_of(*rows: str, chunks: int = 1, v_shaped: bool = False, micro_batches: int = 2) -> Table:
    actions = tuple(tuple(map(act, row.split())) for row in rows)
    return Table("own", StageLayout(len(rows), chunks, v_shaped), micro_batches, actions)


def said(table: Table) -> list[str]:
    return [str(problem) for problem in problems(table)]


def needs(table: Table, rank: int, action: Action) -> Iterator[Key]:
    """What ``action`` takes the results of, read off the definition."""
    action_type, micro_batch, chunk = action
    cut = table.stage_layout
    virtual = cut.virtual(rank, chunk)
    neighbour = {"F": virtual - 1, "B": virtual + 1}.get(action_type, -1)
    if 0 <= neighbour < cut.virtual_stages:
        yield cut.rank_of(neighbour), Action(action_type, micro_batch, cut.chunk_of(neighbour))
    if action_type != "F":
        yield rank, Action("F" if action_type == "B" else "B", micro_batch, chunk)


MISTAKES = {
    "dropped F": (("F0 B0 B1", "F0 B0 F1 B1"), "rank 0: lacks F1. Write an F and a B"),
    "dropped B": (("F0 F1 B0 B1", "F0 B0 F1"), "rank 1: lacks B1. Write an F and a B"),
    "doubled": (("F0 F1 B0 B1", "F0 B0 F1 B1 B1"), "rank 1: has B1 more than once."),
    "B before F": (("F0 B1 B0 F1", "F0 B0 F1 B1"), "rank 0: has B1 before F1. Put F1 first"),
    "W before B": (("F0 F1 W0 B0 B1", "F0 B0 F1 B1"), "rank 0: has W0 before B0. Put B0 first"),
    "unknown micro-batch": (
        ("F0 F1 B0 B1 F2", "F0 B0 F1 B1"),
        "rank 0: has F2, but the schedule has only chunks 0 to 0 and micro-",
    ),
    "unknown chunk": (
        ("F0 F1 B0 B1", "F0 B0 F1 B1 W0.1"),
        "rank 1: has W0.1, but the schedule has only chunks 0 to 0 and micro-",
    ),
    "unknown type": (("F0 F1 B0 B1", "F0 B0 F1 B1 X0"), "rank 1: has X0, but"),
    "deadlock": (
        ("F0 B0 F1 B1", "F0 F1 B0 B1"),
        "ranks 0, 1: deadlock: rank 0 blocks at B0 until rank 1 has run B0; "
        "rank 1 blocks at F1 until rank 0 has run F1. Reorder a row: for example, move B0 of rank 1 before F1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_the_one_thing_that_is_named(name: str) -> None:
    rows, text = MISTAKES[name]
    (line,) = said(table_of(*rows))
    assert line.startswith(text)
    with pytest.raises(ScheduleError) as error:
        simulate(table_of(*rows), Costs.uniform(2))
    assert str(error.value) == line


def test_ranks_outside_a_deadlock_are_not_blamed() -> None:
    (line,) = said(table_of("F0 F1 B0 B1", "F0 B0 F1 B1", "F0 F1 B0 B1", "F0 F1 B0 B1"))
    assert line.startswith("ranks 1, 2: deadlock: rank 1 blocks at B0 until rank 2 has run B0; rank 2 blocks at F1")


def test_a_rank_can_wait_for_itself() -> None:
    rows = ("F0 B0 B0.1 F0.1", "F0 F0.1 B0.1 B0")
    (line,) = said(table_of(*rows, chunks=2, v_shaped=True, micro_batches=1))
    assert line.startswith("rank 0: has B0.1 before F0.1")
    rows = ("F0 F0.1 B0.1 B0", "F0.1 F0 B0.1 B0")
    (line,) = said(table_of(*rows, chunks=2, v_shaped=True, micro_batches=1))
    assert line.startswith("rank 1: deadlock: rank 1 blocks at F0.1 until the same rank has run F0. Reorder a row")


def test_a_row_too_few_and_long_lists() -> None:
    table = make_table("1f1b", 2, 1, 8)
    one_row = Table(table.schedule, table.stage_layout, 8, table.actions[:1])
    assert said(one_row) == [
        "ranks 0 to 1: expected 2 rows of actions, one per rank, got 1. "
        "Write one row per rank, or change the number of stages"
    ]
    empty = Table(table.schedule, table.stage_layout, 8, ((), table.actions[1]))
    assert said(empty) == [
        "rank 0: lacks F0, B0, F1, B1 and 12 more. Write an F and a B of every chunk for every micro-batch"
    ]


@pytest.mark.parametrize(
    ("rows", "fine"),
    [
        (("F0 F1", "F0 F1"), True),  # forward only
        (("F1 F0 B1 B0", "F1 B1 F0 B0"), True),  # in any order
        (("F0 F1 B0 B1 W1", "F0 B0 W0 F1 B1"), True),  # some W put off, some not
        (("F0 F1", "F0 B0 F1 B1"), False),  # backward on one rank only
    ],
)
def test_what_a_user_may_write(rows: tuple[str, str], fine: bool) -> None:
    assert (not said(table_of(*rows))) == fine


@st.composite
def any_order(draw: st.DrawFn) -> Table:
    """Every action once, in any order at all."""
    cut = StageLayout(draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.booleans()))
    micro_batches = draw(st.integers(1, 2))
    types = draw(st.sampled_from(["F", "FB", "FBW"]))
    due = [Action(k, m, c) for m in range(micro_batches) for k in types for c in range(cut.chunks)]
    swaps = st.lists(st.tuples(st.integers(0, len(due) - 1), st.integers(0, len(due) - 1)), max_size=4)
    rows = []
    for _ in range(cut.stages):
        row = sorted(due, key=lambda a: (a.type, a.micro_batch, -a.chunk if a.type == "B" else a.chunk))
        for i, j in draw(swaps):
            row[i], row[j] = row[j], row[i]
        rows.append(tuple(row))
    return Table("own", cut, micro_batches, tuple(rows))


@given(any_order())
def test_a_table_runs_just_when_nothing_needs_what_comes_after_it(table: Table) -> None:
    graph: dict[Key, set[Key]] = {}
    for rank, row in enumerate(table.actions):
        for before, action in zip((None, *row), row, strict=False):
            graph[rank, action] = set(needs(table, rank, action)) | ({(rank, before)} if before else set())
    try:
        TopologicalSorter(graph).prepare()
        runs = True
    except CycleError:
        runs = False
    assert (not problems(table)) == runs


def test_a_timeline_by_hand() -> None:
    costs = Costs(forward=(1, 2), backward=(2, 3), weight=(1, 4), transfer=1)
    timeline = simulate(table_of("F0 F1 B0 W0 B1", "F0 B0 F1 B1"), costs)
    times = [[(str(action), start, end) for action, start, end in row] for row in timeline.spans]
    assert times == [
        [("F0", 0, 1), ("F1", 1, 2), ("B0", 12, 14), ("W0", 14, 15), ("B1", 21, 24)],  # B1 has no W: 2 + 1
        [("F0", 2, 4), ("B0", 4, 11), ("F1", 11, 13), ("B1", 13, 20)],
    ]
    assert timeline.end == 24
    assert timeline.bubble == pytest.approx(1 - (8 + 18) / 48)
    assert timeline.peak_in_flight == (2, 1)


def test_no_transfer_between_chunks_of_one_rank() -> None:
    table = table_of("F0 F0.1 B0.1 B0", "F0 F0.1 B0.1 B0", chunks=2, v_shaped=True, micro_batches=1)
    timeline = simulate(table, Costs.uniform(4, weight=0, transfer=10))
    assert timeline.end == 8 + 4 * 10  # down, up, and back; not at the turn, nor from the loss


def test_a_micro_batch_is_held_until_its_weights_have_their_gradient() -> None:
    at_once, late = "F0 B0 W0 F1 B1 W1", "F0 B0 F1 B1 W0 W1"
    assert simulate(table_of(at_once), Costs.uniform(1)).peak_in_flight == (1,)
    assert simulate(table_of(late), Costs.uniform(1)).peak_in_flight == (2,)


costs_of = st.integers(0, 5)


def check_starts(timeline: Timeline) -> None:
    """Every action starts when the last thing it has to wait for has come, and not later."""
    table, costs = timeline.table, timeline.costs
    ends = {(rank, span.action): span.end for rank, row in enumerate(timeline.spans) for span in row}
    for rank, row in enumerate(timeline.spans):
        before = Span(row[0].action, 0, 0)
        for span in row:
            come = [ends[key] + (costs.transfer if key[0] != rank else 0) for key in needs(table, rank, span.action)]
            assert span.start == max([before.end, *come])
            before = span


@given(
    st.sampled_from([("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zbh1", 1), ("zbv", 2)]),
    st.integers(1, 4),
    st.integers(1, 8),
    st.data(),
)
def test_all_start_as_early_as_they_can(
    schedule: tuple[str, int], stages: int, micro_batches: int, data: st.DataObject
) -> None:
    name, chunks = schedule
    each = st.tuples(*[costs_of] * (stages * chunks))
    costs = Costs(data.draw(each), data.draw(each), data.draw(each), data.draw(costs_of))
    timeline = simulate(make_table(name, stages, chunks, micro_batches), costs)
    check_starts(timeline)
    work = micro_batches * sum(costs.forward + costs.backward + costs.weight)
    assert sum(span.end - span.start for row in timeline.spans for span in row) == work


def test_the_bubble_is_the_idle_share() -> None:
    one = Fraction(1)
    timeline = simulate(table_of("F0 B0", "F0 B0", micro_batches=1), Costs.uniform(2, one, one, one))
    assert timeline.bubble == Fraction(1, 2)
