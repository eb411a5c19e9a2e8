"""Which rows each step uses, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.config.schema.fields import Rampup, parse_rampup, parse_skip_batches
from internlm.data.batch_plan import BatchPlan, Position

counts = st.integers(1, 6)
rampups = st.none() | st.builds(Rampup, counts, counts, counts)
skips = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5))).map(
    lambda pairs: parse_skip_batches(",".join(f"{first}-{first + more}" for first, more in pairs))
)


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    rampup = draw(rampups)
    step_rows = draw(st.integers(rampup.start if rampup else 1, 40))
    sizes = dict(data_size=draw(counts), round_size=draw(st.integers(1, 3)))
    return BatchPlan(step_rows=step_rows, **sizes, rampup=rampup, skip=draw(skips))


def rows_of(plan: BatchPlan, step: int) -> list[int]:
    return [row for rank in range(plan.data_size) for row in plan.rows(step, rank)]


def skipped(plan: BatchPlan) -> set[int]:
    return {batch for first, last in plan.skip for batch in range(first, last + 1)}


@given(plans())
def test_steps_use_the_batches_that_are_left_one_after_another(plan: BatchPlan) -> None:
    start, increment, every = plan.rampup or (plan.step_rows, 1, 1)
    sizes = [min(plan.step_rows, start + increment * (b // every)) for b in range(80)]
    firsts = [0, *accumulate(sizes)]
    kept = [batch for batch in range(80) if batch not in skipped(plan)]
    limit = plan.data_size * plan.round_size
    for step, batch in enumerate(kept[:20]):
        assert rows_of(plan, step) == list(range(firsts[batch], firsts[batch + 1]))
        assert plan.rows_of_step(step)[:2] == (batch, firsts[batch])
        of_ranks = [len(plan.rows(step, rank)) for rank in range(plan.data_size)]
        full = plan.micro_batches(step)
        assert of_ranks == [min(full, max(sizes[batch] - rank * full, 0)) for rank in range(plan.data_size)]
        assert full % plan.round_size == 0 < sizes[batch] <= full * plan.data_size < sizes[batch] + limit


@given(plans(), counts, st.integers(0, 40))
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(plan: BatchPlan, data_size: int, step: int) -> None:
    assert rows_of(replace(plan, data_size=data_size), step) == rows_of(plan, step)


@given(plans(), st.integers(0, 30), st.integers(0, 10))
def test_resuming_changes_nothing(plan: BatchPlan, at: int, later: int) -> None:
    resumed = plan.resumed_at(plan.position(at))
    assert rows_of(resumed, at + later) == rows_of(plan, at + later)
    assert resumed.position(at + later) == plan.position(at + later)


@given(plans(), plans(), st.integers(0, 30))
def test_resuming_with_another_plan_goes_on_with_the_very_next_row(
    before: BatchPlan, after: BatchPlan, at: int
) -> None:
    after = replace(after, skip=(), origin=before.position(at))
    assert rows_of(after, at)[0] == (rows_of(before, at - 1)[-1] + 1 if at else 0)


def test_batches_may_be_skipped_on_resuming() -> None:
    """As after a loss spike at batches 12 to 14: the run goes back to step 10 and leaves them out."""
    straight = BatchPlan(step_rows=4, data_size=2)
    resumed = BatchPlan(step_rows=4, data_size=2, skip=((3, 5), (12, 14))).resumed_at(straight.position(10))
    assert [rows_of(resumed, step)[0] // 4 for step in range(10, 14)] == [10, 11, 15, 16]


def test_positions() -> None:
    plan = BatchPlan(step_rows=6, data_size=2, skip=((0, 1), (4, 4)))
    assert [plan.position(step) for step in (0, 1, 2, 3)] == [
        Position(0, 0, 0),
        Position(1, 3, 18),
        Position(2, 4, 24),
        Position(3, 6, 36),
    ]


def test_strings() -> None:
    assert parse_skip_batches("") == ()
    assert parse_skip_batches("7, 2-4,5 - 6,9") == ((2, 7), (9, 9))
    assert parse_rampup("") is None
    assert parse_rampup("192 24 8") == (192, 24, 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a", "'a'"), ("1-", "'1-'"), ("-1", "'-1'"), ("5-3", "ends before it begins"), ("1-2-3", "1-2-3")],
)
def test_bad_skip_batches(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_skip_batches(text)


@pytest.mark.parametrize("text", ["1 2", "1 2 3 4", "0 1 1", "1 1 0", "a b c", "1 -1 1", "1.5 1 1"])
def test_bad_rampup(text: str) -> None:
    with pytest.raises(ValueError, match="three integers of at least 1"):
        parse_rampup(text)
