"""Which dtype to compute in."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over many elements of ``dtype``: fp32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)
