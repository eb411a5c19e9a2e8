"""Parallel linear: one layer and one autograd function for all parallel modes; only the communicator differs.

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

#: Cheap function of a layer's input, such as a norm, that the layer applies first and recomputes in backward.
Before = Callable[[Tensor], Tensor]


class ParallelLinear(nn.Module):
    """Parallel linear layer: y = x · Wᵀ + b, with W of shape [*out_shape, I].

    A fused projection keeps its natural axes in ``out_shape``: (kv heads, query heads per kv head + 2, head dimension)
    for wqkv, (2, intermediate) for w13. It can then be split over ranks along a single axis.

    Args:
        in_features: Number of input features, I.
        out_shape: Shape of the output features of a token; its product is O.
        init: Distribution of the initial values of the weight. A bias starts at zero.
        bias: Whether to add a bias.
        role: Role of the layer, which decides how a mode splits the weight (:mod:`internlm.core.parallel.sharding`).
        split_axis: Axis of ``out_shape`` along which mtp, msp and fsp split the output of a column linear.
    """

    communicator: Communicator = IDENTITY
    chunk = 0  # index of the chunk in its pipeline stage; isp reads it from linears outside of blocks, such as the head

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
        """Apply the layer: [T, I] → [T, *out_shape], or this rank's shard of the output.

        Args:
            x: Input, [T, I]; with ``before``, of any shape that ``before`` accepts.
            before: Function applied to ``x`` first. Its output is not saved but recomputed in backward, so it must be
                cheap, deterministic, and depend on nothing but ``x`` and parameters, as a norm or an activation does.
        """
        whole = self.out_shape if self.communicator.splits_weight else self.own_out_shape
        if torch.compiler.is_compiling():
            return self._compiled(before(x) if before else x, math.prod(whole)).view(-1, *whole)
        y: Tensor
        if torch.is_grad_enabled():
            y = _Linear.apply(x, self.weight, self.bias, self.communicator, before)
        else:
            y, _ = _output(x, self.weight, self.bias, self.communicator, before)
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
        """Return the description of the layer for ``print(model)``."""
        return f"{self.weight.shape[-1]} -> {list(self.out_shape)}, bias={self.bias is not None}, {self.role}"


class _Linear(torch.autograd.Function):
    """Autograd function of a parallel linear: optional input function, matmul, communication and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, before: Before | None
    ) -> Tensor:
        y, gathered = _output(x, weight, bias, comm, before)
        keeps = comm.keeps_gathered_input and ctx.needs_input_grad[1]  # only the gradient of the weight needs it
        # The input is saved for before, and for the gradient of the weight.
        ctx.save_for_backward(None if keeps and before is None else x, gathered if keeps else None)
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
        x, inputs = _recompute(ctx.before, x, needs_x)
        needs_dx = needs_x if inputs is x else inputs.requires_grad  # parameters of before may need it
        kept = inputs.detach() if gathered is None else gathered
        dx, dw = products.gradients(dy, kept, gathered is not None, weight, comm, needs_dx, needs_weight)
        if inputs is not x and needs_dx:
            inputs.backward(dx)  # a nested backward pass, which also accumulates the gradients of before's parameters
            dx = x.grad
        return dx, dw, db, None, None


def _output(
    x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, before: Before | None
) -> tuple[Tensor, Tensor]:
    """Return the output of the layer and its gathered input."""
    y, gathered = products.output(before(x) if before else x, weight, comm)
    if bias is not None:  # after the communication: an all-reduce of the output would add it once for each rank
        y += bias.view(-1)
    return y, gathered


def _recompute(before: Before | None, x: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
    """Detach ``x`` and recompute ``before(x)`` with autograd enabled; return the detached ``x`` and the result.

    If ``before`` is None, return ``x`` twice. ``needs_x`` tells whether the gradient of ``x`` is needed.
    """
    if before is None:
        return x, x
    with torch.enable_grad():
        x = x.detach().requires_grad_(needs_x)
        return x, before(x)
