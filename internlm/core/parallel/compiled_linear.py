"""A linear as one operator of a compiled graph, which the compiler does not look into.

What a linear does besides its products no compiler can follow: it talks to other ranks, adds its weight's gradient to
``main_grad``, and may put that off. As an operator it is a node like any other, so what stands before and after it is
compiled together.

The layer itself is an argument, as a :class:`Layer`: a graph knows no more of it than that it is one, so the same
graph serves all blocks.

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


class Linear(Protocol):
    """What the operator asks of a layer."""

    weight: nn.Parameter
    communicator: Communicator


class Layer(OpaqueBase):
    """A linear, as an operator takes it."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear

    def __getstate__(self) -> None:
        """Nothing, so that a compiled graph is found again in the compiler's cache, whatever the layer holds."""


register_opaque_type(Layer, typ="reference")


@torch.library.custom_op("internlm::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, layer: Layer, tokens: int, features: int, keeps: bool) -> tuple[Tensor, Tensor]:
    # ``weight`` says that there is a gradient to be had; that of the layer is the parameter, which has a ``main_grad``.
    y, inputs = products.output(x, layer.linear.weight.detach(), layer.linear.communicator)
    return y, inputs if keeps else x.new_empty(0)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, layer: Layer, tokens: int, features: int, keeps: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(tokens, features), x.new_empty(tokens, x.shape[1]) if keeps else x.new_empty(0)


@torch.library.custom_op("internlm::linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, kept: Tensor, layer: Layer, tokens: int, keeps: bool) -> Tensor:
    weight, comm = layer.linear.weight, layer.linear.communicator
    if weight.requires_grad and deferred_tasks(weight) is not None:
        dy, kept = dy.clone(), kept.clone()  # the compiler gives their memory to others after this
    dy = comm.gather_grad_output(dy)
    dx, dw = products.gradients(dy, kept, kept if keeps else None, weight, comm, True, weight.requires_grad)
    if dw is not None:  # there is no ``main_grad``
        weight.grad = dw if weight.grad is None else weight.grad + dw
    assert dx is not None
    return dx


@_linear_backward.register_fake
def _(dy: Tensor, kept: Tensor, layer: Layer, tokens: int, keeps: bool) -> Tensor:
    return dy.new_empty(tokens, kept.shape[1])


torch.fx.has_side_effect(torch.ops.internlm.linear_backward.default)  # it runs though nobody wants its result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, ctx.layer, _, _, ctx.keeps = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(output[1] if ctx.keeps else x)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (kept,) = ctx.saved_tensors
    return _linear_backward(dy, kept, ctx.layer, ctx.tokens, ctx.keeps), None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, layer: Layer, weight: Tensor, features: int, comm: Communicator) -> Tensor:
    """x: [T, I] → [T, O] by the layer, whose ``weight`` and communicator these are."""
    y: Tensor = _linear(x, weight, layer, comm.output_tokens(x.shape[0]), features, comm.keeps_gathered_input)[0]
    return y
