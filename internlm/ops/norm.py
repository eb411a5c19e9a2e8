"""RMSNorm and layer normalisation over the hidden dimension.

Shapes: T tokens, H hidden size; T may stand for any number of dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.accelerator import is_host
from internlm.ops import reference
from internlm.ops.cpu.cpu_gemm import runs_few_tokens
from internlm.utils.dtype import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute ``x / rms(x) * (weight + offset)`` over the last dimension: [T, H], [H] → [T, H].

    The source is arXiv 1910.07467, equation 4; the offset is 0 there, and 1 in Gemma (arXiv 2403.08295).

    Half-precision inputs are normalised in fp32, and the result is rounded once. Only the arguments and one value per
    token are saved for backward.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses the plain formula better than it could a custom autograd function.
        width = wide(x.dtype)
        return reference.rms_norm(x.to(width), weight.to(width), eps, offset).to(x.dtype)
    if not is_host(x) and x.dtype == weight.dtype:
        # One fused kernel per pass; many small ones on the CPU.
        return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)
    if runs_few_tokens(x):
        # The same operations, since a linear calls this without gradients in forward, and with them in backward.
        return _normalise(x, weight, eps, offset)[0]
    return _RMSNorm.apply(x, weight, eps, offset)


def _normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return RMSNorm of ``x``, and 1 / rms(x), [T, 1]."""
    wide_x = x.to(wide(x.dtype))
    # vector_norm reads x once; x.square().mean() would write and read a tensor of its size.
    inverse = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide_x * inverse).mul_(weight + offset if offset else weight).to(x.dtype), inverse


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute ``(x - mean) / std * weight + bias`` over the last dimension (arXiv 1607.06450, eq. 4).

    Shapes: [T, H], [H], [H] -> [T, H]. The computation runs in the wider of the dtypes of ``x`` and ``weight``; the
    result has the dtype of ``x``.
    """
    width = torch.promote_types(x.dtype, weight.dtype)
    vectors = weight.to(width), None if bias is None else bias.to(width)
    return F.layer_norm(x.to(width), weight.shape, *vectors, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, inverse = _normalise(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute the gradients of RMSNorm with the fused backward kernel of layer normalisation, called with mean 0.

        With g = dout · weight and r = 1 / rms, layer normalisation has dx = r · (g - mean(g) - r² · x · mean(g · x)).
        RMSNorm has the same dx without the term mean(g), so r · mean(g) is added back.
        """
        x, weight, inverse = ctx.saved_tensors
        wide_x, wide_dout, wide_weight = (t.to(inverse.dtype) for t in (x, dout, weight))
        if ctx.offset:
            wide_weight = wide_weight + ctx.offset
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            wide_dout, wide_x, weight.shape, torch.zeros_like(inverse), inverse, wide_weight, None, [True, True, False]
        )
        # Not matmul, which expands the weight for some shapes of more than two dimensions.
        sums = torch.mv(wide_dout.reshape(-1, x.shape[-1]), wide_weight)
        mean = sums.div_(x.shape[-1]).view_as(inverse)  # mean(g): [T, 1]
        return dx.addcmul_(mean, inverse).to(x.dtype), dweight.to(weight.dtype), None, None
