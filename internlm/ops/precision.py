"""Which dtype to compute in."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over many elements of ``dtype``: fp32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)


def grad_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The dtype that autograd has the gradient of ``parameter`` in."""
    return (parameter.grad_dtype if parameter.is_leaf else None) or parameter.dtype
