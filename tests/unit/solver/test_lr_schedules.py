"""Learning rate and beta2 as functions of the step."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.config.schema import AdamConfig, Beta2SchedulerConfig, LRSchedulerConfig
from internlm.solver.lr_schedules import SHAPES, Beta2Schedule, LRSchedule

# Steps 0-1 at zero, 2-5 warming up, 6-15 falling from 1.0 to 0.2.
EXAMPLE = LRSchedule(peak=1.0, total_steps=16, init_steps=2, warmup_steps=4, eta_min=0.2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.0),
        (2, 0.25),
        (3, 0.5),
        (5, 1.0),
        (6, 1.0),
        (11, 0.6),
        (15, 0.2 + 0.8 * (1 + math.cos(math.pi * 0.9)) / 2),
        (16, 0.2),
        (10_000, 0.2),
    ],
)
def test_learning_rate_by_hand(step: int, expected: float) -> None:
    assert EXAMPLE(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (LRSchedule(peak=1.0, total_steps=4), [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0]),
        (LRSchedule(peak=1.0, total_steps=4, warmup_steps=4), [0.25, 0.5, 0.75, 1.0, 1.0, 0.0]),
        (LRSchedule(peak=1.0, total_steps=1), [1.0, 0.0]),
        (LRSchedule(peak=1.0, total_steps=8, warmup_steps=4, first_step=2), [0.75, 1.0, 1.0]),
        (
            LRSchedule(peak=1.0, total_steps=6, warmup_steps=2, eta_min=0.2, shape="linear"),
            [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2],
        ),
        (LRSchedule(peak=1.0, total_steps=4, warmup_steps=2, eta_min=0.2, shape="constant"), [0.5, 1.0, 1.0, 1.0, 1.0]),
        (
            LRSchedule(peak=1.0, total_steps=6, init_steps=1, warmup_steps=1, eta_min=0.2, shape="wsd", decay_steps=2),
            [0.0, 1.0, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2],
        ),
        (LRSchedule(peak=1.0, total_steps=3, shape="wsd", decay_steps=9), [1.0, 2 / 3, 1 / 3, 0.0]),
        (LRSchedule(peak=1.0, total_steps=3, shape="wsd", decay_steps=0), [1.0, 1.0, 1.0, 1.0]),
    ],
    ids=[
        *["cosine alone", "warm-up alone", "one step", "not from the first step"],
        *["linear", "constant", "warm-up, stable, decay", "decay alone", "no decay"],
    ],
)
def test_corners_of_the_learning_rate(schedule: LRSchedule, rates: list[float]) -> None:
    assert [schedule(step) for step in range(len(rates))] == pytest.approx(rates, abs=1e-12)


@st.composite
def schedules(draw: st.DrawFn) -> LRSchedule:
    total = draw(st.integers(1, 500))
    peak = draw(st.floats(1e-6, 1.0))
    return LRSchedule(
        peak=peak,
        total_steps=total,
        init_steps=draw(st.integers(0, total)),
        warmup_steps=draw(st.integers(0, total)),
        eta_min=draw(st.floats(0, peak)),
        first_step=draw(st.integers(0, total)),
        shape=draw(st.sampled_from(sorted(SHAPES))),
        decay_steps=draw(st.integers(0, total)),
    )


@given(schedules())
def test_the_learning_rate_stays_between_zero_and_the_peak(schedule: LRSchedule) -> None:
    rates = [schedule(step) for step in range(2 * schedule.total_steps + 5)]
    assert all(0 <= rate <= schedule.peak * (1 + 1e-12) for rate in rates)


@given(schedules())
def test_the_learning_rate_rises_once_and_falls_once(schedule: LRSchedule) -> None:
    rates = [schedule(step) for step in range(2 * schedule.total_steps + 5)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@given(schedules())
def test_the_learning_rate_moves_in_small_steps(schedule: LRSchedule) -> None:
    """No step exceeds the steepest slope of warm-up and decay, once ``init_steps`` are over."""
    length = max(schedule.total_steps - schedule.init_steps - schedule.warmup_steps, 1)
    decay = max(min(schedule.decay_steps, length), 1) if schedule.shape == "wsd" else length
    largest = schedule.peak * max(1 / max(schedule.warmup_steps, 1), math.pi / 2 / decay)
    first = max(schedule.init_steps - schedule.first_step, 0)
    rates = [schedule(step) for step in range(first, 2 * schedule.total_steps + 5)]
    jumps = [abs(b - a) for a, b in pairwise(rates)]
    assert all(jump <= largest * (1 + 1e-9) for jump in jumps)


def test_learning_rate_from_a_config() -> None:
    config = LRSchedulerConfig(total_steps=100, init_steps=3, warmup_ratio=0.1, eta_min=0.5, last_epoch=4)
    assert LRSchedule.from_config(config, AdamConfig(lr=2.0)) == LRSchedule(
        peak=2.0,
        total_steps=100,
        init_steps=3,
        warmup_steps=10,
        eta_min=0.5,
        first_step=5,
        shape="cosine",
        decay_steps=10,
    )


@pytest.mark.parametrize("total", [100, 200, 300, 400, 500, 600, 700, 800, 900])
def test_steps_are_the_floor_of_the_decimal_ratio(total: int) -> None:
    """Not of the nearest float: 100 · 0.29 is 28.999… in floating point."""
    for hundredths in range(101):
        ratio = float(Decimal(hundredths) / 100)
        config = LRSchedulerConfig(total_steps=total, warmup_ratio=ratio, decay_ratio=ratio, type="wsd")
        schedule = LRSchedule.from_config(config, AdamConfig(lr=1.0))
        expected = math.floor(Decimal(repr(ratio)) * total)
        assert (schedule.warmup_steps, schedule.decay_steps) == (expected, expected), ratio


@pytest.mark.parametrize("steps", range(0, 301, 7))
def test_a_ratio_that_was_computed_from_steps_gives_these_steps(steps: int) -> None:
    config = LRSchedulerConfig(total_steps=300, warmup_ratio=steps / 300)
    assert LRSchedule.from_config(config, AdamConfig(lr=1.0)).warmup_steps == steps


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_any_ratio_is_rounded_down_once_its_own_rounding_is_allowed_for(ratio: float, total: int) -> None:
    config = LRSchedulerConfig(total_steps=total, warmup_ratio=ratio)
    steps = LRSchedule.from_config(config, AdamConfig(lr=1.0)).warmup_steps
    assert steps <= Fraction(ratio) * total * (1 + Fraction(1, 2**52)) < steps + 1 + Fraction(1, 2**20)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Beta2Schedule(init=0.95), [0.95, 0.95, 0.95, 0.95]),
        (Beta2Schedule(init=0.95, c=-1.0), [0.95, 0.95, 0.95, 0.95]),
        (Beta2Schedule(init=0.6, c=1.0), [0.6, 0.6, 1 - 1 / 3, 1 - 1 / 4]),
        (Beta2Schedule(init=0.0, c=0.5), [0.0, 1 - 2**-0.5, 1 - 3**-0.5, 0.5]),
        (Beta2Schedule(init=0.6, c=1.0, first_step=2), [1 - 1 / 3, 1 - 1 / 4, 1 - 1 / 5, 1 - 1 / 6]),
    ],
    ids=["constant", "negative exponent", "c = 1", "c = 1/2", "not from the first step"],
)
def test_beta2_by_hand(schedule: Beta2Schedule, expected: list[float]) -> None:
    assert [schedule(step) for step in range(4)] == pytest.approx(expected, rel=1e-12)


@given(st.floats(0, 0.999), st.floats(-1, 2), st.integers(0, 10**6))
def test_beta2_never_falls_and_stays_below_one(init: float, c: float, step: int) -> None:
    schedule = Beta2Schedule(init, c)
    assert init <= schedule(step) <= schedule(step + 1) <= 1


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (Beta2SchedulerConfig(), Beta2Schedule(0.99, 0.8, 0)),
        (Beta2SchedulerConfig(init_beta2=0.9, c=0.5, cur_iter=9), Beta2Schedule(0.9, 0.5, 10)),
        (Beta2SchedulerConfig(init_beta2=0.0, c=0.0), Beta2Schedule(0.0, 0.0, 0)),
    ],
    ids=["from adam", "its own", "zeros are values"],
)
def test_beta2_from_a_config(section: Beta2SchedulerConfig, expected: Beta2Schedule) -> None:
    assert Beta2Schedule.from_config(section, AdamConfig(lr=1.0, adam_beta2=0.99, adam_beta2_c=0.8)) == expected
