"""The gated activation of the feed-forward block (Shazeer 2020).

Shapes: T tokens, F intermediate features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``: [T, 2, F], gate then up, -> [T, F]. Saves its input alone."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.unbind(1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.unbind(1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.unbind(1)
        torch.mul(dout, up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        torch.ops.aten.silu.out(gate, out=dup).mul_(dout)
        return dgate_up
