"""Parallel linear: one layer and one autograd function for all parallel modes; only the communicator differs.

:class:`LinearGroup` applies several linears to one input, as if their weights were one.

Shapes: T tokens, I input features, O output features (the product of ``out_shape``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from internlm.core.parallel import compiled_linear, products
from internlm.core.parallel.communicator import IDENTITY, Communicator
from internlm.core.parallel.param_state import add_grad, place, wait_for_all_gather
from internlm.core.parallel.placement import Init, constant
from internlm.core.parallel.products import Outputs
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
    #: Whether the linear has the input of the linear before it, in a :class:`LinearGroup`.
    shares_input = False

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
        self._handle = compiled_linear.LinearHandle((self,))

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """Apply the layer: [T, I] → [T, *out_shape], or this rank's shard of the output.

        Args:
            x: Input, [T, I]; with ``before``, of any shape that ``before`` accepts.
            before: Function applied to ``x`` first. Its output is not saved but recomputed in backward, so it must be
                cheap, deterministic, and depend on nothing but ``x`` and parameters, as a norm or an activation does.
        """
        return _apply((self,), 0, self._handle, x, before)

    @property
    def gathered_out_shape(self) -> tuple[int, ...]:
        """Shape of the output of a token on this rank."""
        return self.out_shape if self.communicator.splits_weight else self.own_out_shape

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied or unpickled layer must not keep the handle of the original, which would run the original's weight.
        self._handle = compiled_linear.LinearHandle((self,))

    def extra_repr(self) -> str:
        """Return the description of the layer for ``print(model)``."""
        return f"{self.weight.shape[-1]} -> {list(self.out_shape)}, bias={self.bias is not None}, {self.role}"


class LinearGroup(nn.Module):
    """Group of column linears with one input, whose outputs are the ranges of one output along an axis.

    The input is computed and gathered once, and its gradient reduced once. What is computed is what one linear with the
    weights of all of them computes, whereas optimizer and checkpoints see their weights one by one.

    The linears belong to the module that has them as attributes, which gives their parameters their names.

    Args:
        linears: The linears, in the order of their outputs.
        axis: Axis of ``out_shape`` along which the outputs are joined.
    """

    def __init__(self, linears: Sequence[ParallelLinear], axis: int) -> None:
        super().__init__()
        self.linears, self.axis = tuple(linears), axis  # a tuple, whose modules are not submodules
        for linear in self.linears[1:]:
            linear.shares_input = True
        self._handle = compiled_linear.LinearHandle(self.linears, axis)

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """Apply the linears: [T, I] → [T, *joint shape], or this rank's shard of the output.

        The arguments are those of :meth:`ParallelLinear.forward`.
        """
        if not torch.compiler.is_compiling():
            for linear in self.linears:  # whose own forward, with its hooks, is not called
                wait_for_all_gather(linear.weight)
        return _apply(self.linears, self.axis, self._handle, x, before)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = compiled_linear.LinearHandle(self.linears, self.axis)

    def extra_repr(self) -> str:
        """Return the description of the group for ``print(model)``."""
        return f"{len(self.linears)} linears, joined along axis {self.axis}"


def _apply(
    linears: Sequence[ParallelLinear],
    axis: int,
    handle: compiled_linear.LinearHandle,
    x: Tensor,
    before: Before | None,
) -> Tensor:
    """Apply linears, whose outputs are joined along ``axis``, to ``before(x)``: [T, I] → [T, *joint shape]."""
    outputs = Outputs.of(linears, axis)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    y: Tensor
    if torch.compiler.is_compiling():
        # The compiler decides what is saved for backward.
        y = compiled_linear.linear(before(x) if before else x, handle, weights, outputs)
        shaped = [b.view(shape) for b, shape in zip(biases, outputs.shapes, strict=True) if b is not None]
        y = y + torch.cat(shaped, axis).view(-1) if shaped else y
    elif torch.is_grad_enabled():
        y = _Linear.apply(x, before, outputs, *weights, *biases)
    else:
        y, _ = _output(x, before, outputs, weights, biases)
    return y.view(y.shape[0], *outputs.shape)


class _Linear(torch.autograd.Function):
    """Autograd function of parallel linears: optional input function, matmuls, communication and biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Before | None, outputs: Outputs, *parameters: Any) -> Tensor:
        count = len(outputs.comms)
        weights, biases = parameters[:count], parameters[count:]
        y, gathered = _output(x, before, outputs, weights, biases)
        # Only the gradients of weights need the gathered input.
        keeps = outputs.comms[0].keeps_gathered_input and any(ctx.needs_input_grad[3 : 3 + count])
        # The input is saved for before, and for the gradients of weights.
        ctx.save_for_backward(None if keeps and before is None else x, gathered if keeps else None)
        # Parameters are not saved as tensors: offloading and other hooks on saved tensors would pack them.
        ctx.weights, ctx.biases, ctx.outputs, ctx.before = weights, biases, outputs, before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, gathered), outputs = ctx.saved_tensors, ctx.outputs
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[: len(ctx.weights)], needs[len(ctx.weights) :]
        # Before dy is gathered: a row's bias is added to this rank's tokens only.
        dbs = _grad_biases(dy, ctx.biases, outputs, needs_biases)
        dy = outputs.comms[0].gather_grad_output(dy)  # [T, O]
        x, inputs = _recompute(ctx.before, x, needs_x)
        needs_dx = needs_x if inputs is x else inputs.requires_grad  # parameters of before may need it
        kept, is_gathered = (inputs.detach(), False) if gathered is None else (gathered, True)
        dx, dws = products.gradients(dy, kept, is_gathered, ctx.weights, outputs, needs_dx, needs_weights)
        if inputs is not x and needs_dx:
            inputs.backward(dx)  # a nested backward pass, which also accumulates the gradients of before's parameters
            dx = x.grad
        return dx, None, None, *dws, *dbs


def _output(
    x: Tensor, before: Before | None, outputs: Outputs, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return the joint output of linears and their gathered input."""
    y, gathered = products.output(before(x) if before else x, weights, outputs)
    # After the communication: an all-reduce of the output would add a bias once for each rank.
    for own, bias in zip(outputs.split(y), biases, strict=True):
        if bias is not None:
            own += bias.view(own.shape[1:])
    return y, gathered


def _grad_biases(dy: Tensor, biases: Sequence[Tensor], outputs: Outputs, needs: Sequence[bool]) -> list[Tensor | None]:
    """Add the gradients of the biases to their main gradients, or return them."""
    if not any(needs):
        return [None] * len(biases)
    grads = outputs.split(dy.sum(0, keepdim=True))
    rows = zip(biases, grads, needs, strict=True)
    return [add_grad(bias, grad.reshape(-1)) if is_needed else None for bias, grad, is_needed in rows]


def _recompute(before: Before | None, x: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
    """Detach ``x`` and recompute ``before(x)`` with autograd enabled; return the detached ``x`` and the result.

    If ``before`` is None, return ``x`` twice. ``needs_x`` tells whether the gradient of ``x`` is needed.
    """
    if before is None:
        return x, x
    with torch.enable_grad():
        x = x.detach().requires_grad_(needs_x)
        return x, before(x)
