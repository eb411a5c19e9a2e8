from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from internlm.ops import reference, swiglu
from tests.unit.ops.parity import assert_parity, randn, saved_for_backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "features"), [(1, 1), (37, 24), (130, 4096)]
)  # the last takes several blocks of rows
def test_equals_reference(tokens: int, features: int, dtype: torch.dtype) -> None:
    assert_parity(swiglu, reference.swiglu, randn(tokens, 2, features, dtype=dtype))


def test_gradient() -> None:
    assert gradcheck(swiglu, (randn(3, 2, 4),))


def test_takes_the_output_of_a_fused_projection_as_it_is() -> None:
    fused = randn(5, 2 * 8)
    assert torch.equal(swiglu(fused.unflatten(1, (2, 8))), swiglu(torch.stack(fused.chunk(2, 1), 1)))


def test_saves_its_input_alone() -> None:
    gate_up = randn(16, 2, 8)
    with saved_for_backward() as saved:
        swiglu(gate_up)
    assert [t.data_ptr() for t in saved] == [gate_up.data_ptr()]


def test_no_tokens() -> None:
    assert swiglu(torch.empty(0, 2, 8)).shape == (0, 8)
