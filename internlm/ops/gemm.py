"""GEMMs without autograd: output, dx and dw of a linear layer, and a general matmul.

Large unbatched fp32 GEMMs on the CPU use oneDNN. It is never much slower than the BLAS behind ``torch.mm``, and twice
as fast on processors with AVX-512 if that BLAS does not use AVX-512. All other GEMMs use torch's own matmul.
Measurements are in ``doc/performance.md``.

Shapes: T tokens, I input features, O output features; [M, K] @ [K, N] for a general matmul.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.utils.torch_private import onednn_linear

# oneDNN compiles (about 1 ms) and caches (about 0.5 MB) a kernel per shape, so the number of tokens, which may vary
# from call to call, is padded to a multiple of this.
TOKEN_MULTIPLE = 64
# Number of multiply-adds below which oneDNN is slower: its calls have an overhead of 15 us, those of torch.mm 4 us.
_LEAST_WORK = 2**20
# Elements of one block of a weight gradient; bounds the memory of the temporary product.
_BLOCK_ELEMENTS = 2**22


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T``: [T, I], [O, I] → [T, O]."""
    if not _onednn_pays(x, weight.shape[0]):
        return torch.mm(x, weight.t())
    return _onednn(_pad_tokens(x), weight)[: x.shape[0]]


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of :func:`linear` with respect to its input, ``dy @ weight``: [T, O], [O, I] → [T, I]."""
    return linear(dy, weight.t())


def accumulate_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Accumulate the gradient of :func:`linear` with respect to its weight in place: ``out += dy.T @ x``.

    Args:
        out: Gradient, [O, I]; its dtype may be wider than that of the factors (fp32 gradient buffer).
        dy: Gradient of the output, [T, O].
        x: Input, [T, I].
        accumulate: Whether to add to ``out``. False: overwrite it.
    """
    if out.dtype == dy.dtype and not _onednn_pays(dy.t(), x.shape[1]):
        out.addmm_(dy.t(), x, beta=int(accumulate))
        return
    # Neither oneDNN nor a mixed-dtype product can add to its output; blocks bound the size of the temporary.
    rows = max(TOKEN_MULTIPLE, _BLOCK_ELEMENTS // out.shape[1])
    for block, columns in zip(out.split(rows), dy.split(rows, dim=1), strict=True):
        product = _wide_product(columns, x, out.dtype) if out.dtype != dy.dtype else _transposed_product(columns, x)
        if accumulate:
            block.add_(product)
        else:
            block.copy_(product)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b``: [M, K], [K, N] → [M, N], optionally batched; ``a`` may be a transposed view.

    A batched matmul is one BLAS call. Unbatched inputs should have few distinct shapes, because oneDNN caches a kernel
    per shape.
    """
    if a.dim() > 2:
        return torch.bmm(a, b)
    if not _onednn_pays(a, b.shape[1]):
        return torch.mm(a, b)
    return _onednn(a, b.t()) if a.stride(1) == 1 else _transposed_product(a.t(), b)


def onednn_serves(x: Tensor) -> bool:
    """Return whether oneDNN supports the dtype and device of ``x``."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn_pays(left: Tensor, columns: int) -> bool:
    return left.numel() * columns >= _LEAST_WORK and onednn_serves(left)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b.T``: [M, K], [N, K] → [M, N]; a transposed ``a`` is copied, a transposed ``b`` is not."""
    if not (b.is_contiguous() or b.t().is_contiguous()):  # oneDNN has no fast kernel for rows with gaps
        b = b.contiguous()
    return onednn_linear(a, b)


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a.T @ b``: [K, M], [K, N] → [M, N], copying ``a`` or ``b`` in transposed order, whichever costs less.

    If ``b`` is copied, the result is a transposed view; the cost of copying ``b`` includes that of reading this view.
    """
    a, b = _pad_tokens(a), _pad_tokens(b)
    if a.numel() <= b.numel() + a.shape[1] * b.shape[1]:
        return _onednn(a.t(), b.t())
    return _onednn(b.t(), a.t()).t()


def _pad_tokens(x: Tensor) -> Tensor:
    surplus = -x.shape[0] % TOKEN_MULTIPLE
    return F.pad(x, (0, 0, 0, surplus)) if surplus else x


def _wide_product(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``dy.T @ x``, accumulated and returned in ``dtype``, which is wider than that of the factors."""
    if dy.device.type == "cuda":
        return torch.mm(dy.t(), x, out_dtype=dtype)  # tensor cores sum in fp32; do not round the result
    return torch.mm(dy.t().to(dtype), x.to(dtype))
