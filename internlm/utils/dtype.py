"""Names of types in configs, and what they are in torch.

Which dtype to compute in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BY_NAME = {
    "torch.float16": torch.float16,
    "torch.half": torch.float16,
    "torch.bfloat16": torch.bfloat16,
    "torch.float32": torch.float32,
    "torch.tf32": torch.float32,
    "torch.float64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a config's type name; ``torch.tf32`` is stored as float32."""
    return _BY_NAME[name]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the type of newly created tensors within the block."""
    outer = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(outer)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over many elements of ``dtype``: fp32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)


def grad_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The dtype that autograd has the gradient of ``parameter`` in."""
    return (parameter.grad_dtype if parameter.is_leaf else None) or parameter.dtype
