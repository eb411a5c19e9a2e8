"""A linear as a custom op of a compiled graph, which the compiler does not look into.

The compiler can't trace what a linear does besides its products: it communicates, adds its weight's gradient to the
main gradient, and may put that off. As a custom op it is a node like any other, so that the code before and after it is
compiled together.

The layer itself is an argument of the op, as a :class:`LinearHandle`. A graph contains only that there is a handle, so
that the same graph serves all blocks.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from internlm.core.parallel import products
from internlm.core.parallel.communicator import Communicator
from internlm.core.parallel.products import deferred_tasks
from internlm.utils.torch_private import OpaqueBase, register_opaque_type


class LinearModule(Protocol):
    """A layer that the custom op can run."""

    weight: nn.Parameter
    communicator: Communicator


class LinearHandle(OpaqueBase):
    """The custom-op handle of a linear: an argument that refers to the layer."""

    def __init__(self, linear: LinearModule) -> None:
        self.linear = linear

    def __getstate__(self) -> None:
        """Return nothing, so that the key of a graph in the compiler's cache does not depend on the layer."""


register_opaque_type(LinearHandle, typ="reference")

# The argument ``weight`` only makes the result require a gradient where the weight does: autograd does not look into a
# handle. The op itself reads the layer's parameter, which has the main gradient.


@torch.library.custom_op("internlm::linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, layer: LinearHandle, tokens: int, features: int, keeps: bool
) -> tuple[Tensor, Tensor]:
    y, gathered = products.output(x, layer.linear.weight.detach(), layer.linear.communicator)
    return y, gathered if keeps else x.new_empty(0)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, layer: LinearHandle, tokens: int, features: int, keeps: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(tokens, features), x.new_empty(tokens, x.shape[1]) if keeps else x.new_empty(0)


@torch.library.custom_op("internlm::linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, kept: Tensor, layer: LinearHandle, tokens: int, keeps: bool) -> Tensor:
    weight, comm = layer.linear.weight, layer.linear.communicator
    if weight.requires_grad and deferred_tasks(weight) is not None:
        # The compiler reuses the memory of a saved tensor after its last use in the graph; a task reads it later.
        dy, kept = dy.clone(), kept.clone()
    dy = comm.gather_grad_output(dy)
    dx, dw = products.gradients(dy, kept, kept if keeps else None, weight, comm, True, weight.requires_grad)
    if dw is not None:  # without a main gradient; the op returns dx alone, whose shape the compiler can infer
        weight.grad = dw if weight.grad is None else weight.grad + dw
    assert dx is not None
    return dx


@_linear_backward.register_fake
def _(dy: Tensor, kept: Tensor, layer: LinearHandle, tokens: int, keeps: bool) -> Tensor:
    return dy.new_empty(tokens, kept.shape[1])


# Otherwise the compiler removes the op where dx is not needed, and the weight's gradient with it.
torch.fx.has_side_effect(torch.ops.internlm.linear_backward.default)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, ctx.layer, _, _, ctx.keeps = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(output[1] if ctx.keeps else x)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (kept,) = ctx.saved_tensors
    return _linear_backward(dy, kept, ctx.layer, ctx.tokens, ctx.keeps), None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, layer: LinearHandle, weight: Tensor, features: int, comm: Communicator) -> Tensor:
    """Run the layer of a handle: [T, I] → [T, O].

    Args:
        x: [T, I].
        layer: the handle.
        weight: the layer's weight.
        features: O.
        comm: the layer's communicator.
    """
    # Shapes are passed along as numbers: the fake kernel can't ask a handle, whose layer it does not see.
    y: Tensor = _linear(x, weight, layer, comm.output_tokens(x.shape[0]), features, comm.keeps_gathered_input)[0]
    return y
