"""Normalisation over the hidden dimension.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight``, rms over the last dimension (Zhang and Sennrich 2019, eq. 4): [T, H], [H] -> [T, H]."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / std * weight + bias`` over the last dimension (Ba et al. 2016): [T, H], [H], [H] -> [T, H]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
