"""Dtype and length of the demo, by what bfloat16 gains on the processor."""

from __future__ import annotations

import pytest

from internlm.config import load_config
from tools import demo


@pytest.mark.parametrize(
    ("gain", "steps", "dtype", "total", "valid_every"),
    [
        (0.0, None, "torch.float32", 560, 280),
        (1.1, None, "torch.float32", 560, 280),
        (6.0, None, "torch.bfloat16", 800, 400),
        (6.0, 51, "torch.bfloat16", 51, 25),
        (0.0, 1, "torch.float32", 1, 1),
    ],
)
def test_the_demo_trains_longer_in_bfloat16_where_that_is_faster(
    gain: float, steps: int | None, dtype: str, total: int, valid_every: int
) -> None:
    config = load_config(demo.CONFIG, demo.overrides_of(gain, steps), device_type="cpu")
    assert config.model.dtype == dtype
    assert (config.data.total_steps, config.data.valid_every) == (total, valid_every)
