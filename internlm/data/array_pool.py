"""Arrays for rows and batches, used again once nothing refers to them."""

from __future__ import annotations

import sys
import threading
from collections import deque

import numpy as np


class ArrayPool:
    """Pool of uninitialised int64 arrays, which gives an array out again once nothing else refers to it.

    The first write to a page of fresh memory costs ten times as much as another one, since the kernel clears the page.
    Batches are large enough for the allocator to return their memory to the kernel each time.

    A tensor of ``torch.from_numpy`` keeps a reference to its array as long as the tensor, or any view of it, exists. So
    an array that only the pool refers to is not in use.

    Args:
        most: Number of arrays to keep. Arrays beyond it are used once.
    """

    def __init__(self, most: int = 16) -> None:
        self._arrays: deque[np.ndarray] = deque(maxlen=most)
        self._lock = threading.Lock()

    def take(self, *size: int) -> np.ndarray:
        """Return an array of this size, whose values are arbitrary."""
        with self._lock:  # two threads would find the same array unused
            for place in range(len(self._arrays)):
                if _references(self._arrays, place) == _UNUSED and self._arrays[place].shape == size:
                    return self._arrays[place]
            array = np.empty(size, np.int64)
            self._arrays.append(array)
            return array


def _references(arrays: deque[np.ndarray], place: int) -> int:
    return sys.getrefcount(arrays[place])


# Interpreters differ in whether they count the argument of a call.
_UNUSED = _references(deque([np.empty(0)]), 0)
