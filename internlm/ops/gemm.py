"""The GEMMs of training, without autograd: the three of a linear layer, and a plain one.

On the CPU in fp32 the products go through oneDNN: nowhere much slower than the BLAS behind ``torch.mm``, and twice as
fast on processors whose AVX-512 units that BLAS leaves unused. All other products go through ``torch.mm``. Measurements
are in ``doc/performance.md``.

Shapes: T tokens, I input features, O output features; [M, K] @ [K, N] for the plain one.
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
# Elements of a product that exists only to be added to something; bounds the memory of a weight gradient's temporary.
_BLOCK_ELEMENTS = 2**22


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T``: [T, I], [O, I] -> [T, O]."""
    if not _onednn_pays(x, weight.shape[0]):
        return torch.mm(x, weight.t())
    return _onednn(_pad_tokens(x), weight)[: x.shape[0]]


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of :func:`linear` for its input, ``dy @ weight``: [T, O], [O, I] -> [T, I]."""
    return linear(dy, weight.t())


def accumulate_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Compute the gradient of :func:`linear` for its weight in place: ``out += dy.T @ x``.

    Args:
        out: [O, I]; its dtype may be wider than that of the factors, as that of an fp32 gradient buffer is.
        dy: [T, O].
        x: [T, I].
        accumulate: add to ``out`` rather than overwrite it.
    """
    if out.dtype == dy.dtype and not _onednn_pays(dy.t(), x.shape[1]):
        out.addmm_(dy.t(), x, beta=int(accumulate))
        return
    # Neither oneDNN nor a product in mixed dtypes can add to its output, so it needs a temporary: block by block.
    rows = max(TOKEN_MULTIPLE, _BLOCK_ELEMENTS // out.shape[1])
    for block, columns in zip(out.split(rows), dy.split(rows, dim=1), strict=True):
        product = _wide_product(columns, x, out.dtype) if out.dtype != dy.dtype else _transposed_product(columns, x)
        if accumulate:
            block.add_(product)
        else:
            block.copy_(product)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b``: [M, K], [K, N] -> [M, N], or a batch of them; ``a`` may be a transposed view.

    A batch takes one call of the BLAS. Single products should have few distinct shapes, because oneDNN keeps a kernel
    for each.
    """
    if a.dim() > 2:
        return torch.bmm(a, b)
    if not _onednn_pays(a, b.shape[1]):
        return torch.mm(a, b)
    return _onednn(a, b.t()) if a.stride(1) == 1 else _transposed_product(a.t(), b)


def onednn_serves(x: Tensor) -> bool:
    """Return whether products of tensors like ``x`` may go through oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn_pays(left: Tensor, columns: int) -> bool:
    return left.numel() * columns >= _LEAST_WORK and onednn_serves(left)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b.T``: [M, K], [N, K] -> [M, N]; a transposed view is free as ``b`` and copied as ``a``."""
    if not (b.is_contiguous() or b.t().is_contiguous()):  # oneDNN has no fast kernel for rows with gaps
        b = b.contiguous()
    return onednn_linear(a, b)


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a.T @ b``: [K, M], [K, N] -> [M, N], copying the smaller factor in transposed order.

    With ``b`` copied the result is a transposed view, which costs its reader a strided pass; the comparison counts it.
    """
    a, b = _pad_tokens(a), _pad_tokens(b)
    if a.numel() <= b.numel() + a.shape[1] * b.shape[1]:
        return _onednn(a.t(), b.t())
    return _onednn(b.t(), a.t()).t()


def _pad_tokens(x: Tensor) -> Tensor:
    surplus = -x.shape[0] % TOKEN_MULTIPLE
    return F.pad(x, (0, 0, 0, surplus)) if surplus else x


def _wide_product(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``dy.T @ x`` with sums and result in ``dtype``, wider than the dtype of the factors."""
    if dy.device.type == "cuda":
        return torch.mm(dy.t(), x, out_dtype=dtype)  # tensor cores sum in fp32 anyway; this keeps that precision
    return torch.mm(dy.t().to(dtype), x.to(dtype))
