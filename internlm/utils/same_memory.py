"""Functions about the memory of tensors."""

from __future__ import annotations

from torch import Tensor


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors begin at the same address, or either has no elements.

    Storages are compared rather than addresses, which tensors of a dry run lack.
    """
    if not one.numel() or not other.numel():
        return True
    same = one.untyped_storage() is other.untyped_storage()
    return same and one.storage_offset() == other.storage_offset()
