"""Gated activations of the feed-forward block: SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202, eq. 5).

Shapes: T tokens, F intermediate features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.accelerator import is_host
from internlm.config.schema.model import Activation
from internlm.ops import reference
from internlm.ops.cpu.cpu_gemm import runs_few_tokens
from internlm.utils.torch_private import in_backward

_BLOCK = 2**17  # elements of one tensor's block: 512 KiB in fp32, so the blocks of one pass fit into the cache


class _Kernels(NamedTuple):
    """Kernels of an activation that write into given tensors."""

    forward: Callable[..., Tensor]  # (x, out=…)
    backward: Callable[..., Tensor]  # (dout, x, grad_input=…)


_KERNELS: dict[Activation, _Kernels] = {
    "silu": _Kernels(torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input),
    "gelu_tanh": _Kernels(
        partial(torch.ops.aten.gelu.out, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}


def gated(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """Compute ``activation(gate) * up``: [T, 2, F] (gate, up) -> [T, F]; only the input is saved for backward."""
    if torch.compiler.is_compiling():
        # The compiler fuses the plain formula better than it could a custom autograd function.
        return reference.gated(gate_up, activation)
    if runs_few_tokens(gate_up):
        gate, up = gate_up.unbind(1)
        return _KERNELS[activation].forward(gate, out=torch.empty_like(gate)).mul_(up)
    return _Gated.apply(gate_up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = _KERNELS[activation]
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[2])
        # Recomputed for a linear, the function is followed by its own backward pass, which also needs the activation of
        # the gate: it is left where that pass puts the gradient of up.
        ctx.dgate_up = torch.empty_like(gate_up) if ctx.needs_input_grad[0] and in_backward() else None
        active = out if ctx.dgate_up is None else ctx.dgate_up.select(1, 1)
        for gate, up, active_rows, rows in zip(*_row_blocks(*gate_up.unbind(1), active, out), strict=True):
            torch.mul(ctx.kernels.forward(gate, out=active_rows), up, out=rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        dgate_up, ctx.dgate_up = ctx.dgate_up, None
        has_active = dgate_up is not None
        if not has_active:
            dgate_up = torch.empty_like(gate_up)
        blocks = _row_blocks(*gate_up.unbind(1), *dgate_up.unbind(1), dout)
        for gate, up, dgate, dup, rows in zip(*blocks, strict=True):
            # Computed in the output buffers, without temporaries: dgate = activation'(gate) · dout · up, and
            # dup = activation(gate) · dout.
            torch.mul(rows, up, out=dgate)
            ctx.kernels.backward(dgate, gate, grad_input=dgate)
            if not has_active:
                ctx.kernels.forward(gate, out=dup)
            dup.mul_(rows)
        return dgate_up, None


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split each tensor into blocks of rows that fit into the cache of a CPU core; elsewhere, one block is everything.

    With several threads, every operation on a block would be a parallel region, which waits for the slowest thread. On
    a machine with other work, hundreds of short regions take ten times as long as a few.
    """
    tokens, features = tensors[0].shape
    by_blocks = is_host(tensors[0]) and torch.get_num_threads() == 1
    rows = max(1, _BLOCK // features) if by_blocks else max(1, tokens)
    return (x.split(rows) for x in tensors)
