"""The GEMMs of training, without autograd: the three of a linear layer, and a plain one.

Shapes: T tokens, I input features, O output features; [M, K] @ [K, N] for the plain one.

On CPU in fp32 the products go through oneDNN: nowhere much slower than the BLAS behind ``torch.mm``, and twice as fast
on processors whose AVX-512 units that BLAS leaves unused. All else goes through ``torch.mm``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.utils.torch_private import onednn_linear

# oneDNN compiles a kernel for every shape it meets (about 1 ms) and keeps it (about 0.5 MB), so the number of tokens,
# which may vary from call to call, is padded to a multiple of this.
TOKEN_MULTIPLE = 64
# Multiply-adds below which a call to oneDNN (15 us before any work, against 4) costs more than it saves.
_LEAST_WORK = 2**20
# Of a product that is made only to be added to something, so that it takes little memory.
_BLOCK_ELEMENTS = 2**22


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [T, I], [O, I] -> [T, O]."""
    if not _onednn_pays(x, weight.shape[0]):
        return torch.mm(x, weight.t())
    return _onednn(_pad_tokens(x), weight)[: x.shape[0]]


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of :func:`linear` for its input, ``dy @ weight``: [T, O], [O, I] -> [T, I]."""
    return linear(dy, weight.t())


def accumulate_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Gradient of :func:`linear` for its weight, in place: ``out += dy.T @ x``, or ``=`` where not ``accumulate``.

    Shapes: out [O, I], dy [T, O], x [T, I]. ``out`` may be of a wider dtype than the factors.
    """
    if out.dtype == dy.dtype and not _onednn_pays(dy.t(), x.shape[1]):
        out.addmm_(dy.t(), x, beta=int(accumulate))
        return
    rows = max(TOKEN_MULTIPLE, _BLOCK_ELEMENTS // out.shape[1])
    for part, columns in zip(out.split(rows), dy.split(rows, dim=1), strict=True):
        product = _wide_product(columns, x, out.dtype) if out.dtype != dy.dtype else _transposed_product(columns, x)
        if accumulate:
            part.add_(product)
        else:
            part.copy_(product)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: [M, K], [K, N] -> [M, N], or a batch of them; ``a`` may be a transposed view.

    A batch takes one call of the BLAS. The caller sees to it that few distinct shapes of single products occur.
    """
    if a.dim() > 2:
        return torch.bmm(a, b)
    if not _onednn_pays(a, b.shape[1]):
        return torch.mm(a, b)
    return _onednn(a, b.t()) if a.stride(1) == 1 else _transposed_product(a.t(), b)


def onednn_serves(x: Tensor) -> bool:
    """Whether products of tensors like ``x`` may go through oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn_pays(left: Tensor, columns: int) -> bool:
    return left.numel() * columns >= _LEAST_WORK and onednn_serves(left)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``: [M, K], [N, K] -> [M, N]. A transposed view is free as ``b``; as ``a`` it is copied."""
    if not (b.is_contiguous() or b.t().is_contiguous()):  # oneDNN has no fast kernel for rows with gaps
        b = b.contiguous()
    return onednn_linear(a, b)


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``: [K, M], [K, N] -> [M, N]; one factor must be copied in transposed order, so the smaller is.

    With ``b`` copied the result is a transposed view, which costs its reader a strided pass.
    """
    a, b = _pad_tokens(a), _pad_tokens(b)
    if a.numel() <= b.numel() + a.shape[1] * b.shape[1]:
        return _onednn(a.t(), b.t())
    return _onednn(b.t(), a.t()).t()


def _pad_tokens(x: Tensor) -> Tensor:
    surplus = -x.shape[0] % TOKEN_MULTIPLE
    return F.pad(x, (0, 0, 0, surplus)) if surplus else x


def _wide_product(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dy.T @ x`` summed and returned in ``dtype``, wider than that of the factors."""
    if dy.device.type == "cuda":
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return torch.mm(dy.t().to(dtype), x.to(dtype))
