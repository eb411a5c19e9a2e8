"""Dtypes by their names in configs, and the dtypes of sums and gradients."""

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
    """Return the dtype with this config name, such as ``"torch.bfloat16"``; ``"torch.tf32"`` gives float32."""
    return _BY_NAME[name]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype of new tensors to ``dtype`` in the ``with`` block."""
    outer = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(outer)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over many elements of ``dtype``: float32 for 16-bit dtypes, else ``dtype``."""
    # bf16 has 8 bits of mantissa: adding 1 to a running sum of 256 leaves it unchanged.
    return torch.promote_types(dtype, torch.float32)


def grad_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype in which autograd accumulates the gradient of ``parameter``."""
    # ``grad_dtype`` (torch >= 2.10) is None if any dtype is accepted, and raises for non-leaf tensors.
    return (parameter.grad_dtype if parameter.is_leaf else None) or parameter.dtype
