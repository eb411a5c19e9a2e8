"""Settings of families that contradict one another are refused, rather than one of them ignored."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.config.samples import problems_of

LLAMA3: dict[str, Any] = {"type": "llama3", "factor": 8.0, "original_max_position": 32}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.rope_scaling": LLAMA3, "model.rope_scaling_factor": 2.0}, "model.rope_scaling: is given beside"),
        ({"model.rope_scaling": LLAMA3, "model.use_dynamic_ntk_rope": True}, "model.rope_scaling: is given beside"),
        ({"model.rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "model.rope_scaling: low_freq_factor = 1.0"),
        ({"model.use_sliding_window": True}, "model.use_sliding_window: True, but model.sliding_window is not given"),
        ({"model_type": "hf", "model.lora": {"rank": 2}}, "model.lora: is given, but the model type 'hf' is not"),
    ],
    ids=str,
)
def test_contradictions_are_named(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changes)
    assert problem.startswith(expected)
