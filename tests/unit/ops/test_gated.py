from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from internlm.ops import gated, reference
from tests.unit.ops.parity import assert_parity, randn, saved_for_backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "features"), [(1, 1), (37, 24), (130, 4096)]
)  # the last takes several blocks of rows
def test_equals_reference(tokens: int, features: int, dtype: torch.dtype) -> None:
    assert_parity(gated, reference.gated, randn(tokens, 2, features, dtype=dtype))


def test_gradient() -> None:
    assert gradcheck(gated, (randn(3, 2, 4),))


def test_takes_the_output_of_a_fused_projection_as_it_is() -> None:
    fused = randn(5, 2 * 8)
    assert torch.equal(gated(fused.unflatten(1, (2, 8))), gated(torch.stack(fused.chunk(2, 1), 1)))


def test_saves_its_input_alone() -> None:
    gate_up = randn(16, 2, 8)
    with saved_for_backward() as saved:
        gated(gate_up)
    assert [t.data_ptr() for t in saved] == [gate_up.data_ptr()]


def test_no_tokens() -> None:
    assert gated(torch.empty(0, 2, 8)).shape == (0, 8)


class Recomputed(torch.autograd.Function):
    """SwiGLU that is computed again in its backward pass, as a linear does with its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor | None:
        with torch.enable_grad():
            gate_up = ctx.saved_tensors[0].detach().requires_grad_()
            gated(gate_up).backward(dout)
        return gate_up.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_in_a_backward_pass_it_has_the_same_gradient_bit_by_bit(dtype: torch.dtype) -> None:
    """Though it then keeps silu(gate), which its own backward pass would compute again."""
    gate_up, dout = randn(130, 2, 4096, dtype=dtype), randn(130, 4096, dtype=dtype, seed=1).detach()
    grads = [torch.autograd.grad(function(gate_up), gate_up, dout)[0] for function in (gated, Recomputed.apply)]
    assert torch.equal(*grads)


def test_a_second_backward_pass_finds_the_same_gradient() -> None:
    gate_up, found = randn(3, 2, 4), list[Tensor]()

    def again(_: Tensor) -> None:
        with torch.enable_grad():
            inner = gate_up.detach().requires_grad_()
            out = gated(inner).sum()
            found.extend(torch.autograd.grad(out, inner, retain_graph=True)[0] for _ in range(2))

    hooked = gate_up * 1
    hooked.register_hook(again)
    hooked.sum().backward()
    assert torch.equal(*found)
    assert found[0].any()
