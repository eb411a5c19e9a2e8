"""Normalisation over the hidden dimension.

Shapes: T tokens, H hidden; any number of dimensions may stand in the place of T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.ops import reference
from internlm.utils.dtype import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich 2019, eq. 4): [T, H], [H] -> [T, H].

    Half precision is computed in fp32. Saves ``x`` and one number per token.
    """
    if torch.compiler.is_compiling():
        width = wide(x.dtype)
        return reference.rms_norm(x.to(width), weight.to(width), eps).to(x.dtype)
    if x.device.type == "cuda" and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel each way; on CPU it is a chain of small ones
    return _RMSNorm.apply(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / std * weight + bias`` over the last dimension (Ba et al. 2016): [T, H], [H], [H] -> [T, H].

    Computed in the type of ``weight``, which may be wider than that of ``x``.
    """
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide_x = x.to(wide(x.dtype))
        inverse = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide_x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        """Layer norm of mean zero, whose fused kernel serves, plus the term that only a subtracted mean has."""
        x, weight, inverse = ctx.saved_tensors
        wide_x, wide_dout, wide_weight = (t.to(inverse.dtype) for t in (x, dout, weight))
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            wide_dout, wide_x, weight.shape, torch.zeros_like(inverse), inverse, wide_weight, None, [True, True, False]
        )
        mean = torch.matmul(wide_dout, wide_weight).div_(x.shape[-1]).unsqueeze(-1)
        return dx.addcmul_(mean, inverse).to(x.dtype), dweight.to(weight.dtype), None
