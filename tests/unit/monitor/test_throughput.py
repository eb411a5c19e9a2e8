"""Tokens per device and second, by hand."""

from __future__ import annotations

import pytest

from internlm.monitor import Throughput

NAMES = ["tgs/last_tgs_1", "tgs/tgs_all", "tgs/tgs_avg", "tgs/tgs_SMA", "tgs/last_tgs_10", "tgs/last_tgs_50"]


def metrics_of(devices: int, *steps: tuple[int, float]) -> dict[str, float]:
    throughput = Throughput(devices)
    for tokens, seconds in steps:
        throughput.add(tokens, seconds)
    return throughput.metrics()


def test_the_names_in_the_order_of_the_log() -> None:
    assert list(metrics_of(1, (100, 1.0))) == NAMES


def test_one_step() -> None:
    """400 tokens over 4 devices in 2 s: 50 tokens per device and second, whichever way."""
    assert metrics_of(4, (400, 2.0)) == dict.fromkeys(NAMES, 50.0)


def test_a_slow_step_weighs_more_in_the_total_than_in_the_mean_over_steps() -> None:
    found = metrics_of(1, (100, 1.0), (100, 4.0))
    assert found["tgs/last_tgs_1"] == 25
    assert found["tgs/tgs_all"] == 200 / 5
    assert found["tgs/tgs_avg"] == (100 + 25) / 2
    assert found["tgs/tgs_SMA"] == (100 + 25) / 2


def test_windows() -> None:
    """150 steps: 50 at 10 a second, 50 at 20, 40 at 40, 10 at 80."""
    steps = [(10, 1.0)] * 50 + [(20, 1.0)] * 50 + [(40, 1.0)] * 40 + [(80, 1.0)] * 10
    found = metrics_of(1, *steps)
    assert found["tgs/last_tgs_1"] == 80
    assert found["tgs/last_tgs_10"] == 80
    assert found["tgs/last_tgs_50"] == (40 * 40 + 10 * 80) / 50
    assert found["tgs/tgs_SMA"] == pytest.approx((50 * 20 + 40 * 40 + 10 * 80) / 100)
    assert found["tgs/tgs_all"] == found["tgs/tgs_avg"] == pytest.approx((500 + 1000 + 1600 + 800) / 150)


def test_windows_are_of_tokens_over_time_not_of_rates() -> None:
    assert metrics_of(1, (100, 1.0), (100, 4.0))["tgs/last_tgs_10"] == 200 / 5
