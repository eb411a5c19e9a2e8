"""The dynamic loss scale, event by event."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm.config.schema import GradScalerConfig
from internlm.config.schema.optim import FP16Config
from internlm.solver.optimizer import LossScale


def scale_of(**keys: float) -> LossScale:
    fp16 = FP16Config(initial_scale=keys.pop("initial", 16.0), min_scale=4, growth_interval=3)
    return LossScale(GradScalerConfig(fp16=fp16, max_scale=64, **keys))


def after(scale: LossScale, events: str) -> list[float]:
    """The scale after each event: ``.`` a good step, ``!`` an overflow."""
    scales = []
    for event in events:
        scale.update(overflow=torch.tensor(event == "!"))
        scales.append(scale.scale)
    return scales


@pytest.mark.parametrize(
    ("events", "scales"),
    [
        ("...", [16, 16, 32]),
        ("......", [16, 16, 32, 32, 32, 64]),
        (".........", [16, 16, 32, 32, 32, 64, 64, 64, 64]),  # no further than the largest
        ("!.", [16, 16]),  # one overflow is forgiven
        ("!!", [16, 8]),
        ("!!!", [16, 8, 4]),  # from then on each counts
        ("!!!!!", [16, 8, 4, 4, 4]),  # no further than the smallest
        ("!.!", [16, 16, 8]),  # they need not be neighbours
        ("!...!", [16, 16, 16, 32, 32]),  # forgotten once it has grown
        ("..!..!...", [16, 16, 16, 16, 16, 8, 8, 8, 16]),  # good steps are counted anew
    ],
)
def test_events(events: str, scales: list[float]) -> None:
    assert after(scale_of(hysteresis=2), events) == scales


def test_factors_of_the_config() -> None:
    scale = scale_of(hysteresis=1, growth_factor=1.5, backoff_factor=0.75)
    assert after(scale, "!...") == [12, 12, 12, 18]


def test_of_other_types_it_is_one_for_ever() -> None:
    assert set(after(LossScale(), "!!!......!" * 5)) == {1.0}


def test_a_shorter_interval_than_before() -> None:
    scale = scale_of()
    scale.load_state_dict({"scale": 16.0, "good_steps": 100, "overflows": 0})
    assert after(scale, "..") == [32, 32]


@given(st.text("!.", max_size=30), st.text("!.", max_size=30))
def test_a_checkpoint_goes_on_where_it_was(before: str, later: str) -> None:
    one, other = scale_of(), scale_of(initial=4.0)
    after(one, before)
    other.load_state_dict(one.state_dict())
    assert after(other, later) == after(one, later)


@given(st.text("!.", max_size=200))
def test_it_stays_within_its_bounds(events: str) -> None:
    assert all(4 <= scale <= 64 for scale in after(scale_of(), events))
