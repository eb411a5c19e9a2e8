"""GEMMs without autograd: output, dx and dw of a linear layer.

On the CPU the kernel depends on the processor (:mod:`internlm.ops.cpu`); elsewhere it is torch's own. Measurements are
in ``doc/performance.md``.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internlm.accelerator import is_host
from internlm.ops.cpu import cpu_gemm

# Elements of one block of a weight gradient; bounds the memory of the temporary product.
_BLOCK_ELEMENTS = 2**22


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T``: [T, I], [O, I] → [T, O]."""
    return cpu_gemm.linear(x, weight) if is_host(x) else torch.mm(x, weight.t())


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of :func:`linear` with respect to its input, ``dy @ weight``: [T, O], [O, I] → [T, I]."""
    return cpu_gemm.grad_input(dy, weight) if is_host(dy) else torch.mm(dy, weight)


def accumulate_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Accumulate the gradient of :func:`linear` with respect to its weight in place: ``out += dy.T @ x``.

    Args:
        out: Gradient, [O, I]; its dtype may be wider than that of the factors (fp32 gradient buffer).
        dy: Gradient of the output, [T, O].
        x: Input, [T, I].
        accumulate: Whether to add to ``out``. False: overwrite it.
    """
    if is_host(out):
        cpu_gemm.accumulate_grad_weight(out, dy, x, accumulate)
        return
    if out.dtype == dy.dtype:
        out.addmm_(dy.t(), x, beta=int(accumulate))
        return
    # A mixed-dtype product cannot add to its output; blocks bound the size of the temporary.
    rows = max(1, _BLOCK_ELEMENTS // out.shape[1])
    for block, columns in zip(out.split(rows), dy.split(rows, dim=1), strict=True):
        product = torch.mm(columns.t(), x, out_dtype=out.dtype)  # tensor cores sum in fp32; do not round the result
        if accumulate:
            block.add_(product)
        else:
            block.copy_(product)
