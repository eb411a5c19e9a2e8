"""One differentiable step between ranks, from what it does forward and what it does with the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Step = Callable[[Tensor], Tensor]


def exchange(x: Tensor, forward: Step, backward: Step) -> Tensor:
    """``forward(x)``, whose gradient is ``backward`` of the gradient of the result."""
    y: Tensor = _Exchange.apply(x, forward, backward)
    return y


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Step, backward: Step) -> Tensor:
        ctx.backward_step = backward
        y = forward(x)
        return y.view_as(y) if y is x else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_step(dy), None, None
