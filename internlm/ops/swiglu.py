"""SwiGLU, the gated activation of the feed-forward block (Shazeer 2020, arXiv 2002.05202, eq. 5).

Shapes: T tokens, F intermediate features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.accelerator import is_host
from internlm.ops import reference
from internlm.utils.torch_private import in_backward

_BLOCK = 2**17  # elements of one tensor's block: 512 KiB in fp32, so the blocks of one pass fit into the cache


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up``: [T, 2, F] (gate, up) -> [T, F]; only the input is saved for backward."""
    # The compiler fuses the plain formula better than it could a custom autograd function.
    return reference.swiglu(gate_up) if torch.compiler.is_compiling() else _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[2])
        # Recomputed for a linear, the function is followed by its own backward pass, which also needs silu(gate): it is
        # left where that pass puts the gradient of up.
        ctx.dgate_up = torch.empty_like(gate_up) if ctx.needs_input_grad[0] and in_backward() else None
        silu = out if ctx.dgate_up is None else ctx.dgate_up.select(1, 1)
        for gate, up, silu_rows, rows in zip(*_row_blocks(*gate_up.unbind(1), silu, out), strict=True):
            torch.mul(torch.ops.aten.silu.out(gate, out=silu_rows), up, out=rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        dgate_up, ctx.dgate_up = ctx.dgate_up, None
        has_silu = dgate_up is not None
        if not has_silu:
            dgate_up = torch.empty_like(gate_up)
        blocks = _row_blocks(*gate_up.unbind(1), *dgate_up.unbind(1), dout)
        for gate, up, dgate, dup, rows in zip(*blocks, strict=True):
            # Computed in the output buffers, without temporaries: dgate = silu'(gate) · dout · up, and
            # dup = silu(gate) · dout.
            torch.mul(rows, up, out=dgate)
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
            if not has_silu:
                torch.ops.aten.silu.out(gate, out=dup)
            dup.mul_(rows)
        return dgate_up


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split each tensor into blocks of rows that fit into the cache of a CPU core; elsewhere, one block is everything.

    With several threads, every operation on a block would be a parallel region, which waits for the slowest thread. On
    a machine with other work, hundreds of short regions take ten times as long as a few.
    """
    tokens, features = tensors[0].shape
    by_blocks = is_host(tensors[0]) and torch.get_num_threads() == 1
    rows = max(1, _BLOCK // features) if by_blocks else max(1, tokens)
    return (x.split(rows) for x in tensors)
