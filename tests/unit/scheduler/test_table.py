"""The schedules: complete, free of deadlock, and as good as their papers say.

p: stages, v: chunks, m: micro-batches; F, B, W: what the actions of a whole rank cost for a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from internlm.core.scheduler.actions import Action, Table
from internlm.core.scheduler.table import SCHEDULES, make_table, schedule_of
from internlm.core.scheduler.timeline import Costs, Timeline
from internlm.core.scheduler.validate import ScheduleError, problems, simulate

stages = st.integers(1, 8)
micro_batches = st.integers(1, 32)
several_chunks = st.integers(1, 4)
cost = st.integers(1, 6)
CHUNKS = {"gpipe": 1, "1f1b": 1, "zbh1": 1, "zbv": 2}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    schedule = draw(st.sampled_from(SCHEDULES))
    chunks = CHUNKS.get(schedule) or draw(several_chunks)
    return make_table(schedule, draw(stages), chunks, draw(micro_batches))


def run(schedule: str, p: int, m: int, v: int = 1, f: int = 1, b: int = 1, w: int = 1) -> Timeline:
    """With the exact cost of a rank divided among its chunks."""
    each = Fraction(f, v), Fraction(b, v), Fraction(w, v)
    return simulate(make_table(schedule, p, v, m), Costs.uniform(p * v, *each, transfer=Fraction(0)))


def idle(timeline: Timeline) -> set[Fraction]:
    """How long ranks do nothing from the start of the first to the end of the last."""
    return {timeline.end - sum(span.end - span.start for span in row) for row in timeline.spans}


def pauses(timeline: Timeline) -> list[Fraction]:
    """By rank, how long it does nothing between its first and its last action."""
    return [row[-1].end - row[0].start - sum(span.end - span.start for span in row) for row in timeline.spans]


@given(tables())
def test_every_table_can_run_and_does_everything_once(table: Table) -> None:
    assert problems(table) == []
    types = "FBW" if table.schedule.startswith("zb") else "FB"
    due = [Action(k, m, c) for k in types for m in range(table.micro_batches) for c in range(table.stage_layout.chunks)]
    assert all(Counter(row) == Counter(due) for row in table.actions)
    assert problems(table.forward_only()) == []


@given(tables(), st.data())
def test_a_planted_mistake_is_found(table: Table, data: st.DataObject) -> None:
    assume(table.stage_layout.virtual_stages * table.micro_batches > 1)  # F0 B0 without B0 is a table of F alone
    rank = data.draw(st.integers(0, table.stage_layout.stages - 1))
    row = list(table.actions[rank])
    action = data.draw(st.sampled_from([action for action in row if action.type != "W"]))
    place, other = row.index(action), row.index(action._replace(type="FB"[action.type == "F"]))
    swapped = list(row)
    swapped[place], swapped[other] = swapped[other], swapped[place]
    dropped, doubled = [a for a in row if a != action], [*row, action]
    mistakes = {"lacks": dropped, "more than once": doubled, "before": swapped}
    for word, wrong in mistakes.items():
        rows = (*table.actions[:rank], tuple(wrong), *table.actions[rank + 1 :])
        found = problems(Table(table.schedule, table.stage_layout, table.micro_batches, rows))
        assert {problem.where for problem in found} == {f"rank {rank}"}
        assert any(word in problem.message for problem in found)


@pytest.mark.parametrize(
    ("schedule", "size", "rows"),
    [
        ("gpipe", (2, 1, 3), ["F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2"]),
        ("1f1b", (1, 1, 3), ["F0 B0 F1 B1 F2 B2"]),
        ("1f1b", (2, 1, 3), ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]),
        (
            "interleaved",
            (2, 2, 2),
            ["F0 F1 F0.1 F1.1 B0.1 B1.1 B0 B1", "F0 F1 F0.1 B0.1 F1.1 B1.1 B0 B1"],
        ),
        ("zbh1", (2, 1, 3), ["F0 F1 B0 W0 F2 B1 W1 B2 W2", "F0 B0 F1 B1 W0 F2 B2 W1 W2"]),
        ("zbv", (1, 2, 1), ["F0 F0.1 B0.1 W0.1 B0 W0"]),
        (
            "zbv",
            (2, 2, 3),
            [
                "F0 F1 F2 F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 B0 W0 F2.1 B2.1 W2.1 B1 W1 B2 W2",
                "F0 F0.1 F1 F1.1 B0.1 W0.1 F2 B0 W0 F2.1 B1.1 W1.1 B1 B2.1 B2 W1 W2.1 W2",
            ],
        ),
    ],
)
def test_small_tables_in_full(schedule: str, size: tuple[int, int, int], rows: list[str]) -> None:
    assert [" ".join(map(str, row)) for row in make_table(schedule, *size).actions] == rows


@given(st.sampled_from(["1f1b", "gpipe"]), stages, micro_batches, cost, cost, cost)
def test_gpipe_and_1f1b_wait_for_one_micro_batch_to_fill_the_pipeline(
    schedule: str, p: int, m: int, f: int, b: int, w: int
) -> None:
    timeline = run(schedule, p, m, f=f, b=b, w=w)
    assert idle(timeline) == {(p - 1) * (f + b + w)}
    assert timeline.bubble == Fraction(p - 1, m + p - 1)


@given(stages, several_chunks, st.integers(1, 4), cost, cost, cost)
def test_chunks_divide_the_bubble_where_rounds_are_whole(p: int, v: int, rounds: int, f: int, b: int, w: int) -> None:
    m = rounds * p
    timeline = run("interleaved", p, m, v, f, b, w)
    assert idle(timeline) == {Fraction((p - 1) * (f + b + w), v)}
    ideal = m * (f + b + w)
    assert (timeline.end - ideal) / ideal == Fraction(p - 1, v * m)


@given(stages, several_chunks, micro_batches, cost, cost, cost)
def test_a_smaller_last_round_costs_at_most_what_chunks_save(p: int, v: int, m: int, f: int, b: int, w: int) -> None:
    whole = (p - 1) * (f + b + w)
    (each,) = idle(run("interleaved", p, m, v, f, b, w))
    assert Fraction(whole, v) <= each <= whole


@given(stages, micro_batches, cost, cost, cost)
def test_zbh1_fills_the_drain_with_weight_gradients(p: int, m: int, f: int, b: int, w: int) -> None:
    assume(min(f, w) <= b)
    assert idle(run("zbh1", p, m, f=f, b=b, w=w)) == {(p - 1) * (f + b) - (min(m, p) - 1) * min(f, w)}


@given(stages, micro_batches)
def test_zbh1_waits_a_third_of_1f1b(p: int, m: int) -> None:
    assume(m >= p)
    (zbh1,), (one,) = idle(run("zbh1", p, m)), idle(run("1f1b", p, m))
    assert zbh1 * 3 == one


@given(stages, micro_batches)
def test_zbv_never_pauses_once_there_are_two_micro_batches_a_stage_less_one(p: int, m: int) -> None:
    timeline = run("zbv", p, m, 2, 2, 2, 2)  # 1 for each action
    assert max(pauses(timeline)) == max(0, 2 * (2 * p - 1 - m))
    # No schedule ends before 6m + p − 1: the last rank has to wait p − 1 for its first micro-batch.
    assert timeline.end == 6 * m + max(p - 1, 4 * (p - 1) - 2 * (m - 1))


@given(stages, st.integers(0, 9), cost, cost, cost)
def test_zbv_pauses_by_what_backward_takes_longer_than_weights(p: int, more: int, x: int, y: int, z: int) -> None:
    w, f, b = sorted([x, y, z])
    timeline = run("zbv", p, 2 * p - 1 + more, 2, f, b, w)
    assert max(pauses(timeline)) == (p - 1) * (b - w)  # costs of a chunk are half as large


#: Chunks × micro-batches whose activations rank i keeps at most.
HELD = {
    "gpipe": lambda i, p, v, m: m,
    "1f1b": lambda i, p, v, m: min(m, p - i),
    "zbh1": lambda i, p, v, m: min(m, p),
    "zbv": lambda i, p, v, m: min(2 * m, 2 * p, m + 1 + i),
}


@given(st.sampled_from(sorted(HELD)), stages, micro_batches)
def test_activations_held_at_most(schedule: str, p: int, m: int) -> None:
    v = CHUNKS[schedule]
    assert run(schedule, p, m, v).peak_in_flight == tuple(HELD[schedule](i, p, v, m) for i in range(p))


@given(stages, several_chunks, micro_batches)
def test_interleaving_holds_what_its_warm_up_brings(p: int, v: int, m: int) -> None:
    most = tuple(min(v * m, (p - i - 1) * 2 + (v - 1) * p + 1) for i in range(p))
    held = run("interleaved", p, m, v).peak_in_flight
    assert held == most if m % p == 0 else all(a <= b for a, b in zip(held, most, strict=True))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("1F1B ", 2, 1, 2), "schedule: '1F1B ' is unknown. Did you mean '1f1b'?"),
        (("spiral", 2, 1, 2), "Known: 1f1b, gpipe, interleaved, zbh1, zbv."),
        (("zbv", 2, 1, 2), "schedule zbv: expected chunks = 2, got 1. Change the number of chunks or the schedule"),
        (("zbh1", 2, 2, 2), "schedule zbh1: expected chunks = 1, got 2. Change the number of chunks or the schedule"),
        (("gpipe", 2, 3, 2), "schedule gpipe: expected chunks = 1, got 3. Change the number of chunks or the schedule"),
        (("1f1b", 2, 2, 2), "schedule 1f1b: expected chunks = 1, got 2. Change the number of chunks or the schedule"),
        (
            ("1f1b", 0, 1, 0),
            "schedule 1f1b: number of stages must be at least 1, got 0. Use a positive number\n"
            "schedule 1f1b: number of micro-batches must be at least 1, got 0. Use a positive number",
        ),
        (("interleaved", 2, 0, 2), "interleaved: number of chunks must be at least 1, got 0. Use a positive number"),
    ],
)
def test_wrong_sizes(arguments: tuple[str, int, int, int], text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        make_table(*arguments)
    assert str(error.value).endswith(text)


@pytest.mark.parametrize(
    ("mode", "chunks", "schedule"),
    [
        ("1F1B", 1, "1f1b"),
        ("1F1B", 3, "interleaved"),
        ("ZBH1", 1, "zbh1"),
        ("ZBV", 2, "zbv"),
        ("GPIPE", 1, "gpipe"),
    ],
)
def test_a_mode_has_a_schedule(mode: str, chunks: int, schedule: str) -> None:
    assert schedule_of(mode, chunks) == schedule
