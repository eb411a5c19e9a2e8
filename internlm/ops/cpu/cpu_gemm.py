"""GEMMs of a linear layer on the CPU, by oneDNN or by torch's own BLAS as the table of kernels says.

Shapes: T tokens, I input features, O output features; [M, K] @ [K, N] for a general matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.accelerator import is_host
from internlm.ops.cpu.kernel_choice import kernel_for
from internlm.utils.torch_private import onednn_linear

# oneDNN compiles (about 1 ms) and caches (about 0.5 MB) a kernel per shape, so the number of tokens, which may vary
# from call to call, is padded to a multiple of this.
TOKEN_MULTIPLE = 64
# Number of multiply-adds below which oneDNN is slower: its calls have an overhead of 15 us, those of torch.mm 4 us.
_LEAST_WORK = 2**20
# Most tokens of a pass whose time is that of reading the weights, as in generation. There, oneDNN reads faster.
FEW_TOKENS = 16
LEAST_WEIGHTS = 2**18
# Most tokens of which MKL reads weights fastest if these are the left factor, and the tokens two columns: on one thread
# at 16 GB/s, as fast as a sum of the weights. With one column, or as the right factor, it reads 10 GB/s.
_COLUMNS = 2
# Elements of one block of a weight gradient; bounds the memory of the temporary product.
_BLOCK_ELEMENTS = 2**22


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T``: [T, I], [O, I] → [T, O]."""
    kernel = _kernel("linear", x, weight.shape[0])
    if kernel == "onednn" and serves_columns(x):
        return _linear_of_columns(x, weight)
    return LINEAR[kernel](x, weight)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute ``dy @ weight``: [T, O], [O, I] → [T, I]."""
    return LINEAR[_kernel("grad_input", dy, weight.shape[1])](dy, weight.t())


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """Compute ``dy.T @ x`` as a new tensor: [T, O], [T, I] → [O, I]."""
    kernel = _kernel("grad_weight", dy, x.shape[1])
    if kernel == "onednn" and dy.shape[1] <= _rows_of_block(x.shape[1]):
        return _transposed_product(dy, x).contiguous()  # all of it is one block, which need not be copied
    out = dy.new_empty(dy.shape[1], x.shape[1])
    GRAD_WEIGHT[kernel](out, dy, x, False)
    return out


def accumulate_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Compute ``out += dy.T @ x`` in place, or overwrite ``out``: [O, I], [T, O], [T, I]; ``out`` may be wider."""
    if out.dtype == dy.dtype:
        GRAD_WEIGHT[_kernel("grad_weight", dy, x.shape[1])](out, dy, x, accumulate)
        return
    kernel = "float32"
    if (out.dtype, dy.dtype) == (torch.float32, torch.bfloat16):
        kernel = kernel_for("grad_weight", "bfloat16", dy.numel() * x.shape[1])
    WIDE_GRAD_WEIGHT[kernel](out, dy, x, accumulate)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b``: [M, K], [K, N] → [M, N], optionally batched; ``a`` may be a transposed view.

    A batched matmul is one BLAS call. Unbatched inputs should have few distinct shapes, because oneDNN caches a kernel
    per shape.
    """
    if a.dim() > 2:
        return torch.bmm(a, b)
    if _kernel("linear", a, b.shape[1]) == "torch":
        return torch.mm(a, b)
    return _onednn(a, b.t()) if a.stride(1) == 1 else _transposed_product(a.t(), b)


def runs_few_tokens(x: Tensor) -> bool:
    """Return whether a pass without gradients has so few tokens, [T, …], that calls cost more than the work in them."""
    return x.shape[0] <= FEW_TOKENS and not torch.is_grad_enabled()


def serves_columns(x: Tensor) -> bool:
    """Return whether ``x``, [T, I], has so few tokens that a product with these as columns is the fastest."""
    return x.shape[0] <= _COLUMNS and torch.backends.mkl.is_available()


def onednn_serves(x: Tensor) -> bool:
    """Return whether oneDNN supports the dtype and device of ``x``."""
    return (
        x.dtype == torch.float32
        and is_host(x)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _kernel(operation: str, left: Tensor, columns: int) -> str:
    work = left.numel() * columns
    reads_weights = left.shape[0] <= FEW_TOKENS and left.shape[-1] * columns >= LEAST_WEIGHTS
    if (work < _LEAST_WORK and not reads_weights) or not onednn_serves(left):
        return "torch"
    return kernel_for(operation, "float32", work)


# -- kernels ----------------------------------------------------------------------------------------------------------
def _torch_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def product_of_few(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` with oneDNN for less than ``TOKEN_MULTIPLE`` tokens; the weight may be packed."""
    tokens = x.shape[0]
    surplus = (1 << (tokens - 1).bit_length()) - tokens  # a power of 2 bounds the number of shapes, too
    return onednn_linear(F.pad(x, (0, 0, 0, surplus)), weight)[:tokens] if surplus else onednn_linear(x, weight)


def _linear_of_columns(x: Tensor, weight: Tensor) -> Tensor:
    columns = x.expand(_COLUMNS, -1).contiguous() if x.shape[0] < _COLUMNS else x
    return torch.mm(weight, columns.t()).t()[: x.shape[0]].contiguous()


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    if x.shape[0] < TOKEN_MULTIPLE:  # generation
        return product_of_few(x, _without_gaps(weight))
    return _onednn(_pad_tokens(x), weight)[: x.shape[0]]


def _torch_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    out.addmm_(dy.t(), x, beta=int(accumulate))


def _onednn_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    _by_blocks(out, dy, lambda columns: _transposed_product(columns, x), accumulate)


def _converted_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    wide_x = x.to(out.dtype)
    _by_blocks(out, dy, lambda columns: torch.mm(columns.t().to(out.dtype), wide_x), accumulate)


def _bf16_grad_weight(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    """Multiply in bfloat16, sum in float32, and do not round the result.

    ``torch.mm`` cannot return float32 from bfloat16 factors on the CPU. So the factors are widened, and oneDNN is
    allowed to multiply float32 factors in bfloat16, to which it converts them back without an error. The sum is a
    separate pass: a product of a transposed factor that adds to its output takes a quarter longer.
    """
    onednn: Any = torch.backends.mkldnn  # its settings have no type stubs
    settings, wide_x = onednn.matmul, x.to(out.dtype)
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        _by_blocks(out, dy, lambda columns: torch.mm(columns.t().to(out.dtype), wide_x), accumulate)
    finally:
        settings.fp32_precision = before


#: Kernels by name: ``x @ weight.T``, ``out (+)= dy.T @ x``, and the latter with a wider ``out``.
LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"onednn": _onednn_linear, "torch": _torch_linear}
GRAD_WEIGHT: dict[str, Callable[[Tensor, Tensor, Tensor, bool], None]] = {
    "onednn": _onednn_grad_weight,
    "torch": _torch_grad_weight,
}
WIDE_GRAD_WEIGHT: dict[str, Callable[[Tensor, Tensor, Tensor, bool], None]] = {
    "float32": _converted_grad_weight,
    "bfloat16": _bf16_grad_weight,
}


# -- parts of kernels -------------------------------------------------------------------------------------------------
def _by_blocks(out: Tensor, dy: Tensor, product: Callable[[Tensor], Tensor], accumulate: bool) -> None:
    """Add ``product(columns of dy)`` to the rows of ``out``, block by block, or overwrite them."""
    # These products cannot add to their output; blocks bound the size of the temporary.
    rows = _rows_of_block(out.shape[1])
    for block, columns in zip(out.split(rows), dy.split(rows, dim=1), strict=True):
        if accumulate:
            block.add_(product(columns))
        else:
            block.copy_(product(columns))


def _rows_of_block(columns: int) -> int:
    return max(TOKEN_MULTIPLE, _BLOCK_ELEMENTS // columns)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b.T``: [M, K], [N, K] → [M, N]; a transposed ``a`` is copied, a transposed ``b`` is not."""
    return onednn_linear(a, _without_gaps(b))


def _without_gaps(b: Tensor) -> Tensor:
    # oneDNN has no fast kernel for rows with gaps.
    return b if b.is_contiguous() or b.t().is_contiguous() else b.contiguous()


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
