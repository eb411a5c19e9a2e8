"""GEMMs without autograd: output, dx and dw of a linear layer.

On the CPU the kernel depends on the processor (:mod:`internlm.ops.cpu`); elsewhere it is torch's own. Measurements are
in ``doc/performance.md``.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internlm.accelerator import is_host, kind_of
from internlm.ops.cpu import cpu_gemm


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``x @ weight.T``: [T, I], [O, I] → [T, O].

    Args:
        x: Input, [T, I].
        weight: Weight, [O, I].
        dtype: Dtype of the result, that of ``x`` or wider; default: that of ``x``.
    """
    dtype = dtype or x.dtype
    if is_host(x):
        return cpu_gemm.linear(x, weight).to(dtype)
    if dtype != x.dtype and kind_of(x.device).adds_wide_products:
        return torch.mm(x, weight.t(), out_dtype=dtype)  # tensor cores sum in fp32, so nothing is rounded
    return torch.mm(x, weight.t()).to(dtype)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of :func:`linear` with respect to its input, ``dy @ weight``: [T, O], [O, I] → [T, I]."""
    return cpu_gemm.grad_input(dy, weight) if is_host(dy) else torch.mm(dy, weight)


def add_grad_input(out: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Add the gradient of :func:`linear` with respect to its input to ``out`` in place, and return ``out``: [T, I]."""
    return out.add_(cpu_gemm.grad_input(dy, weight)) if is_host(dy) else out.addmm_(dy, weight)


def grad_weight(dy: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the gradient of :func:`linear` with respect to its weight, ``dy.T @ x``: [T, O], [T, I] → [O, I].

    The result has ``dtype``, by default that of ``dy``. Its bits are those that :func:`accumulate_grad_weight` writes.
    """
    if is_host(dy) and dtype in (None, dy.dtype):
        return cpu_gemm.grad_weight(dy, x)
    out = dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
    accumulate_grad_weight(out, dy, x, accumulate=False)
    return out


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
    elif out.dtype == dy.dtype:
        out.addmm_(dy.t(), x, beta=int(accumulate))
    elif kind_of(out.device).adds_wide_products:
        # Tensor cores sum in fp32, and add to the fp32 gradient without a rounded or temporary product.
        torch.addmm(out, dy.t(), x, out_dtype=out.dtype, beta=int(accumulate), out=out)
    else:
        out.addmm_(dy.t().to(out.dtype), x.to(out.dtype), beta=int(accumulate))
