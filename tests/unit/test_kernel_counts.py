"""Kernels launched and bytes moved on the path of a GPU, against a plain model: ``python -m bench.count``."""

from __future__ import annotations

import torch

from bench.count import counts

#: Largest ratios of the bytes that a step moves, ours to the plain one's.
MOST_BYTES_OF_A_STEP = 0.85


def test_a_layer_launches_and_moves_no_more_than_a_plain_one_and_a_step_moves_less() -> None:
    for (sizes, part), (ours, plain) in counts(torch.bfloat16):
        most = MOST_BYTES_OF_A_STEP if part == "step" else 1.0
        assert ours.cost.bytes <= most * plain.cost.bytes, (sizes, part)
        if part == "layer":
            assert ours.cost.kernels <= plain.cost.kernels, sizes
        assert plain.cost.bytes > 1e8, "the plain side was not counted"
