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

from internlm.core.parallel import compiled_linear, products
from internlm.core.parallel.communicator import IDENTITY, Communicator
from internlm.core.parallel.param_state import add_grad, place
from internlm.core.parallel.placement import Init, constant
from internlm.core.parallel.sharding import current_sharding

#: What a layer does to its input first.
Before = Callable[[Tensor], Tensor]


class ParallelLinear(nn.Module):
    """y = x · Wᵀ + b, with W of shape [*out_shape, I].

    A fused projection keeps its natural axes in ``out_shape`` ((kv heads, q + 2, head dim), (2, intermediate), …),
    so that splitting it over ranks is splitting one axis, ``split_axis``, whatever else is fused with it. ``role`` says
    how a parallel mode treats it: see :mod:`internlm.core.parallel.sharding`.
    """

    communicator: Communicator = IDENTITY
    chunk = 0  # of the pipeline stage; that of a block where it lies in one

    def __init__(
        self,
        in_features: int,
        out_shape: int | tuple[int, ...],
        init: Init,
        bias: bool = False,
        role: str = "column",
        split_axis: int = 0,
    ) -> None:
        super().__init__()
        self.out_shape = (out_shape,) if isinstance(out_shape, int) else out_shape
        self.role = role
        sharding = current_sharding()
        self.weight = place(sharding.weight_of(role, (*self.out_shape, in_features), init, split_axis))
        self.own_out_shape = tuple(self.weight.shape[:-1])  # though it may become a matrix (fully_sharded.py)
        self.bias = place(sharding.bias_of(role, self.out_shape, constant(0.0), split_axis)) if bias else None
        self._opaque = compiled_linear.Layer(self)

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """x: [T, I] → [T, *out_shape]; with ``before``, the layer of ``before(x)``, whatever the shape of x then.

        ``before`` must be cheap, not random, and depend on nothing but x and parameters (a norm, an activation): its
        output is not kept, but computed again in backward.
        """
        whole = self.out_shape if self.communicator.splits_weight else self.own_out_shape
        if torch.compiler.is_compiling():
            return self._compiled(before(x) if before else x, math.prod(whole)).view(-1, *whole)
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.communicator, before)
        return y.view(y.shape[0], *whole)

    def _compiled(self, x: Tensor, features: int) -> Tensor:
        """x: [T, I] → [T, O]; what the backward pass keeps, the compiler decides."""
        y = compiled_linear.linear(x, self._opaque, self.weight, features, self.communicator)
        return y if self.bias is None else y + self.bias.view(-1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._opaque = compiled_linear.Layer(self)  # of a copy

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]} -> {list(self.out_shape)}, bias={self.bias is not None}, {self.role}"


class _Linear(torch.autograd.Function):
    """The products of a linear layer, and what is done to their input first."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, before: Before | None
    ) -> Tensor:
        y, inputs = products.output(before(x) if before else x, weight, comm)
        if bias is not None:  # not earlier: a sum over ranks would count it on each of them
            y += bias.view(-1)
        ctx.save_for_backward(x, inputs if comm.keeps_gathered_input else None)
        ctx.parameters, ctx.comm, ctx.before = (weight, bias), comm, before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, gathered), (weight, bias), comm = ctx.saved_tensors, ctx.parameters, ctx.comm
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        db = add_grad(bias, dy.sum(0)) if needs_bias else None  # added to this rank's tokens
        dy = comm.gather_grad_output(dy)  # [T, O]
        x, inputs = _again(ctx.before, x)
        needs_dx = needs_x or inputs is not x
        dx, dw = products.gradients(dy, inputs.detach(), gathered, weight, comm, needs_dx, needs_weight)
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
