"""Parallel linear: one layer and one autograd function for all parallel modes, which differ in its communicator.

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

#: A cheap function of a layer's input, such as a norm, that the layer applies first and recomputes in backward.
Before = Callable[[Tensor], Tensor]


class ParallelLinear(nn.Module):
    """y = x · Wᵀ + b, with W of shape [*out_shape, I].

    A fused projection keeps its natural axes in ``out_shape`` ((kv heads, q + 2, head dim), (2, intermediate), …),
    so that splitting it over ranks is splitting one axis, whatever else is fused with it.

    Args:
        in_features: I.
        out_shape: Axes of the output; their product is O.
        init: Distribution of the initial values of the weight. A bias starts at zero.
        bias: Whether there is a bias.
        role: How a parallel mode splits the weight, see :mod:`internlm.core.parallel.sharding`.
        split_axis: Axis of ``out_shape`` along which mtp, msp and fsp split the output of a ``column``.
    """

    communicator: Communicator = IDENTITY
    chunk = 0  # of the pipeline stage; isp reads it from linears outside of blocks, such as the head

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
        self.own_out_shape = tuple(self.weight.shape[:-1])  # kept, since fully_sharded.py makes the weight a matrix
        self.bias = place(sharding.bias_of(role, self.out_shape, constant(0.0), split_axis)) if bias else None
        self._handle = compiled_linear.LinearHandle(self)

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """Apply the layer: [T, I] → [T, *out_shape].

        Args:
            x: [T, I], or of any shape that ``before`` takes.
            before: Applied to ``x`` first. Its output is not saved but recomputed in backward, so it must be cheap,
                deterministic, and depend on nothing but x and parameters (a norm, an activation).
        """
        whole = self.out_shape if self.communicator.splits_weight else self.own_out_shape
        if torch.compiler.is_compiling():
            return self._compiled(before(x) if before else x, math.prod(whole)).view(-1, *whole)
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.communicator, before)
        return y.view(y.shape[0], *whole)

    def _compiled(self, x: Tensor, features: int) -> Tensor:
        """Apply the layer as a custom op: [T, I] → [T, O]. The compiler decides what is saved for backward."""
        y = compiled_linear.linear(x, self._handle, self.weight, features, self.communicator)
        return y if self.bias is None else y + self.bias.view(-1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied or unpickled layer must not keep the handle of the original, which would run the original's weight.
        self._handle = compiled_linear.LinearHandle(self)

    def extra_repr(self) -> str:
        """Return the description of the layer in ``print(model)``."""
        return f"{self.weight.shape[-1]} -> {list(self.out_shape)}, bias={self.bias is not None}, {self.role}"


class _Linear(torch.autograd.Function):
    """Linear with its communication, applied after the function ``before``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, before: Before | None
    ) -> Tensor:
        y, gathered = products.output(before(x) if before else x, weight, comm)
        if bias is not None:  # after the communication: an all-reduce of the output would add it once for each rank
            y += bias.view(-1)
        ctx.save_for_backward(x, gathered if comm.keeps_gathered_input else None)
        # Parameters are not saved as tensors: offloading and other hooks on saved tensors would pack them.
        ctx.parameters, ctx.comm, ctx.before = (weight, bias), comm, before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, gathered), (weight, bias), comm = ctx.saved_tensors, ctx.parameters, ctx.comm
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        # Before dy is gathered: a row's bias is added to this rank's tokens only.
        db = add_grad(bias, dy.sum(0)) if needs_bias else None
        dy = comm.gather_grad_output(dy)  # [T, O]
        x, inputs = _recompute(ctx.before, x)
        needs_dx = needs_x or inputs is not x
        dx, dw = products.gradients(dy, inputs.detach(), gathered, weight, comm, needs_dx, needs_weight)
        if inputs is not x:
            inputs.backward(dx)  # a nested backward pass, which also accumulates the gradients of before's parameters
            dx = x.grad
        return dx, dw, db, None, None


def _recompute(before: Before | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` as a leaf, and ``before(x)`` with its graph; ``x`` twice if there is nothing to recompute."""
    if before is None:
        return x, x
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return x, before(x)
