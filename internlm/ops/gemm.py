"""The three GEMMs of a linear layer, without autograd.

Shapes: T tokens, I input features, O output features.

On CPU in fp32 the products go through oneDNN, which is faster than or as fast as the BLAS behind ``torch.mm``: the
difference is twofold on processors whose AVX-512 units the BLAS leaves unused. All else goes through ``torch.mm``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [T, I], [O, I] -> [T, O]."""
    return _matmul_transposed(x, weight)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of :func:`linear` for its input, ``dy @ weight``: [T, O], [O, I] -> [T, I]."""
    return _matmul_transposed(dy, weight.t())


def accumulate_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Gradient of :func:`linear` for its weight, in place: ``out += dy.T @ x``, or ``=`` where not ``accumulate``.

    Shapes: out [O, I], dy [T, O], x [T, I]. ``out`` may be of a wider dtype than the factors.
    """
    product = _matmul_transposed(dy.t(), x.t())
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)


def _matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``: [M, K], [N, K] -> [M, N]. Either factor may be a transposed view."""
    if _onednn_serves(a):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def _onednn_serves(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available()
