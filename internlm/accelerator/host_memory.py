"""The allocator of host memory.

glibc returns free memory at the end of the heap to the system. The next tensor then takes fresh pages, each of which
the system clears at its first use. A training step frees and allocates the same sizes again and again, so it is faster
if the process keeps its memory. Tensors above 32 MiB still have pages of their own: in the heap, glibc cannot place an
aligned tensor into a gap of just its size, so repeated large ones would let the heap grow.
"""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt(3) and their values, by the variables with which a user may set them.
_OPTIONS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # free bytes at the end of the heap from which on they are returned
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**25),  # bytes from which on an allocation has pages of its own
}


def keep_freed_memory() -> bool:
    """Let the allocator keep freed memory for the next tensors; return whether it does.

    It does not where the user has set one of glibc's own variables (``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES``), and where the C library has no ``mallopt``.
    """
    if not os.environ.keys().isdisjoint(_OPTIONS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in _OPTIONS.values())
