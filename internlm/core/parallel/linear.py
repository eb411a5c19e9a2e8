"""The parallel linear: one layer, one autograd function, and a communicator for whatever mode.

Shapes: T tokens, I input features, O output features (the product of ``out_shape``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from internlm.core.parallel.communicator import SILENT, Communicator
from internlm.core.parallel.main_grad import add_grad, add_weight_grad, weight_grad
from internlm.core.parallel.placement import Init, ParamPlacement, constant, place
from internlm.ops import gemm

#: What a layer does to its input first.
Before = Callable[[Tensor], Tensor]


class ParallelLinear(nn.Module):
    """y = x · Wᵀ + b, with W of shape [*out_shape, I].

    A fused projection keeps its natural axes in ``out_shape`` ((kv heads, q + 2, head dim), (2, intermediate), …),
    so that splitting it over ranks is splitting one axis, whatever else is fused with it.
    """

    def __init__(self, in_features: int, out_shape: int | tuple[int, ...], init: Init, bias: bool = False) -> None:
        super().__init__()
        self.out_shape = (out_shape,) if isinstance(out_shape, int) else out_shape
        self.weight = place(ParamPlacement((*self.out_shape, in_features), init))
        self.bias = place(ParamPlacement(self.out_shape, constant(0.0), is_matrix=False)) if bias else None
        self.communicator: Communicator = SILENT

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """x: [T, I] → [T, *out_shape]; with ``before``, the layer of ``before(x)``, whatever the shape of x then.

        ``before`` must be cheap (a norm, an activation): its output is not kept, but computed again in backward.
        """
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.communicator, before)
        whole = self.out_shape if self.communicator.splits_weight else self.weight.shape[:-1]
        return y.view(y.shape[0], *whole)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]} -> {list(self.out_shape)}, bias={self.bias is not None}"


def _matrix(weight: Tensor) -> Tensor:
    """[*out_shape, I] as [O, I]."""
    return weight.view(math.prod(weight.shape[:-1]), weight.shape[-1])


class _Linear(torch.autograd.Function):
    """The three products of a linear layer, and the six places where ranks may talk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, before: Before | None
    ) -> Tensor:
        inputs = comm.gather_input(before(x) if before else x)
        y = comm.reduce_output(gemm.linear(inputs, _matrix(comm.gather_weight(weight))))  # [T, O]
        if bias is not None:  # not earlier: a sum over ranks would count it on each of them
            y += bias.view(-1)
        ctx.save_for_backward(x)
        ctx.parameters, ctx.comm, ctx.before = (weight, bias), comm, before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (weight, bias), comm = ctx.saved_tensors, ctx.parameters, ctx.comm
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        dy = comm.gather_grad_output(dy)  # [T, O]
        x, inputs = _again(ctx.before, x)
        dw = _weight_grad(weight, dy, comm.gather_input(inputs.detach()), comm) if needs_weight else None
        db = add_grad(bias, dy.sum(0)) if needs_bias else None
        dx = None
        if needs_x or inputs is not x:
            dx = comm.reduce_grad_input(gemm.grad_input(dy, _matrix(comm.gather_weight(weight))))
        if inputs is not x:
            inputs.backward(dx)  # gradients of the parameters of ``before`` are added where they belong
            dx = x.grad
        return dx, dw, db, None, None


def _again(before: Before | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``before(x)``, ready to go backward."""
    if before is None:
        return x, x
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return x, before(x)


def _weight_grad(weight: Tensor, dy: Tensor, x: Tensor, comm: Communicator) -> Tensor | None:
    """In place where the weight is whole; by way of a temporary where its gradient is reduced to this rank's shard
    first."""
    if comm.splits_weight:
        return add_grad(weight, comm.reduce_grad_weight(weight_grad(dy, x)))
    return add_weight_grad(weight, dy, x)
