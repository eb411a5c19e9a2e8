"""Parallel linear as a custom op, which ``torch.compile`` keeps as one node of the graph.

The compiler cannot trace a parallel linear: it communicates, adds the gradient of its weight to the main gradient, and
may defer this gradient. A custom op does not break the graph, so the code before and after it is compiled together.

The layer, or several that have one input, is passed to the op as a :class:`LinearHandle`. A graph does not depend on
the layers that a handle refers to, so all blocks share one graph.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internlm.core.parallel import products
from internlm.core.parallel.products import LinearModule, Outputs, deferred_tasks
from internlm.utils.torch_private import OpaqueBase, register_opaque_type


class LinearHandle(OpaqueBase):
    """Custom-op handle of linears: an opaque argument that refers to the layers.

    Args:
        linears: One linear, or several that have one input.
        axis: Axis along which their outputs are joined.
    """

    def __init__(self, linears: Sequence[LinearModule], axis: int = 0) -> None:
        self.linears, self.axis = linears, axis

    @property
    def outputs(self) -> Outputs:
        """Outputs of the linears."""
        return Outputs.of(self.linears, self.axis)

    def __getstate__(self) -> None:
        """Return None, so that the compiler's cache key of a graph does not depend on the layers."""


register_opaque_type(LinearHandle, typ="reference")

# The argument ``weight`` only makes the output require a gradient if the weight does: autograd does not see the weight
# behind a handle. The op itself reads the parameter of the layer, which has the main gradient.


@torch.library.custom_op("internlm::linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, layer: LinearHandle, tokens: int, features: int, keeps: bool
) -> tuple[Tensor, Tensor]:
    y, gathered = products.output(x, [linear.weight.detach() for linear in layer.linears], layer.outputs)
    return y, gathered if keeps else x.new_empty(0)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, layer: LinearHandle, tokens: int, features: int, keeps: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(tokens, features), x.new_empty(tokens, x.shape[1]) if keeps else x.new_empty(0)


@torch.library.custom_op("internlm::linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, kept: Tensor, layer: LinearHandle, tokens: int, keeps: bool) -> Tensor:
    weights, outputs = [linear.weight for linear in layer.linears], layer.outputs
    if any(weight.requires_grad and deferred_tasks(weight) is not None for weight in weights):
        # The compiler reuses the memory of a saved tensor after its last use in the graph; a task reads it later.
        dy, kept = dy.clone(), kept.clone()
    dy = outputs.comms[0].gather_grad_output(dy)
    needs = [weight.requires_grad for weight in weights]
    dx, dws = products.gradients(dy, kept, keeps, weights, outputs, True, needs)
    for weight, dw in zip(weights, dws, strict=True):
        if dw is not None:  # there is no main gradient; the op returns only dx, whose shape the compiler can infer
            weight.grad = dw if weight.grad is None else weight.grad + dw
    assert dx is not None
    return dx


@_linear_backward.register_fake
def _(dy: Tensor, kept: Tensor, layer: LinearHandle, tokens: int, keeps: bool) -> Tensor:
    return dy.new_empty(tokens, kept.shape[1])


# Without this, the compiler removes the op where dx is unused, and the weight's gradient with it.
torch.fx.has_side_effect(torch.ops.internlm.linear_backward.default)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, ctx.layer, _, _, ctx.keeps = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(output[1] if ctx.keeps else x)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (kept,) = ctx.saved_tensors
    return _linear_backward(dy, kept, ctx.layer, ctx.tokens, ctx.keeps), None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, layer: LinearHandle, weights: Sequence[Tensor], outputs: Outputs) -> Tensor:
    """Run parallel linears without their biases as a custom op: [T, I] → [tokens of the output, O].

    Args:
        x: Input, [T, I].
        layer: Handle of the layers.
        weights: Their weights, from which autograd infers whether the output requires a gradient.
        outputs: Their outputs.
    """
    # Shapes are passed as numbers: the fake kernel cannot read the layers of a handle.
    comm, features = outputs.comms[0], math.prod(outputs.shape)
    weight = next((weight for weight in weights if weight.requires_grad), weights[0])
    y: Tensor = _linear(x, weight, layer, comm.output_tokens(x.shape[0]), features, comm.keeps_gathered_input)[0]
    return y
