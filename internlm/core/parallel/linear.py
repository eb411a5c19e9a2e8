"""The parallel linear: one layer, one autograd function, and a communicator for whatever mode.

Shapes: T tokens, I input features, O output features (the product of ``out_shape``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from internlm.core.parallel.collectives import Pending
from internlm.core.parallel.communicator import SILENT, Communicator
from internlm.core.parallel.deferred import deferred_tasks
from internlm.core.parallel.main_grad import add_grad, add_weight_grad, weight_grad
from internlm.core.parallel.placement import Init, constant, place
from internlm.core.parallel.sharding import current_sharding
from internlm.ops import gemm

#: What a layer does to its input first.
Before = Callable[[Tensor], Tensor]


class ParallelLinear(nn.Module):
    """y = x · Wᵀ + b, with W of shape [*out_shape, I].

    A fused projection keeps its natural axes in ``out_shape`` ((kv heads, q + 2, head dim), (2, intermediate), …),
    so that splitting it over ranks is splitting one axis, ``split_axis``, whatever else is fused with it. ``role`` says
    how a parallel mode treats it: see :mod:`internlm.core.parallel.sharding`.
    """

    communicator: Communicator = SILENT
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
        self.bias = place(sharding.bias_of(role, self.out_shape, constant(0.0), split_axis)) if bias else None

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """x: [T, I] → [T, *out_shape]; with ``before``, the layer of ``before(x)``, whatever the shape of x then.

        ``before`` must be cheap, not random, and depend on nothing but x and parameters (a norm, an activation): its
        output is not kept, but computed again in backward.
        """
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.communicator, before)
        whole = self.out_shape if self.communicator.splits_weight else self.weight.shape[:-1]
        return y.view(y.shape[0], *whole)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]} -> {list(self.out_shape)}, bias={self.bias is not None}, {self.role}"


class _Linear(torch.autograd.Function):
    """The three products of a linear layer, and the places where ranks may talk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, before: Before | None
    ) -> Tensor:
        inputs = comm.gather_input(before(x) if before else x).wait()
        matrix = comm.gather_weight(weight)
        y = comm.reduce_output(gemm.linear(inputs, matrix))  # [T, O]
        comm.release_weight(matrix)
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
        fetch, kept = (Pending, gathered) if gathered is not None else (comm.gather_input, inputs.detach())
        later = deferred_tasks(weight) if needs_weight else None
        # Each begins what runs under the product that comes after it.
        inputs_on_their_way = fetch(kept) if needs_weight and later is None else None
        dx_on_its_way = _grad_input(dy, weight, comm) if needs_x or inputs is not x else None
        dw = _weight_grad(weight, dy, inputs_on_their_way.wait(), comm) if inputs_on_their_way else None
        if later is not None:
            later.append(partial(_weight_grad_later, weight, dy, kept, fetch, comm))
        dx = dx_on_its_way.wait() if dx_on_its_way else None
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


def _weight_grad_later(
    weight: Tensor, dy: Tensor, kept: Tensor, fetch: Callable[[Tensor], Pending], comm: Communicator
) -> None:
    _weight_grad(weight, dy, fetch(kept).wait(), comm)


def _grad_input(dy: Tensor, weight: Tensor, comm: Communicator) -> Pending:
    matrix = comm.gather_weight(weight, backward=True)
    dx = gemm.grad_input(dy, matrix)
    comm.release_weight(matrix)
    return comm.reduce_grad_input(dx)


def _weight_grad(weight: Tensor, dy: Tensor, x: Tensor, comm: Communicator) -> Tensor | None:
    """In place where the weight is whole; by way of a temporary where its gradient is reduced to this rank's shard
    first."""
    if comm.splits_weight:
        return comm.reduce_grad_weight(weight_grad(dy, x), lambda shard: add_grad(weight, shard))
    return add_weight_grad(weight, dy, x)
