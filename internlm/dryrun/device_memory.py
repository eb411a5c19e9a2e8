"""Bytes of the pretended device that a rank holds during a step, by category, and their peak.

A storage counts from the operator that returns it until it is garbage-collected or resized. A real allocator rounds
sizes and keeps freed blocks, which is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from internlm.costs.memory_plan import TRANSIENTS


class _Live(NamedTuple):
    reference: weakref.ref[torch.UntypedStorage]
    category: str
    nbytes: int


class DeviceMemory:
    """Record of the live storages of one device type.

    Args:
        device_type: Device type of the storages to record.
        category: Function that returns the category of a storage that was created just now.
        place: Function that returns the line of code that is running.
    """

    def __init__(self, device_type: str, category: Callable[[], str], place: Callable[[], str]) -> None:
        self.device_type, self._category, self._place = device_type, category, place
        self._live: dict[int, _Live] = {}
        self.held: Counter[str] = Counter()
        """Bytes now, by category."""
        self.total = 0
        self.peak: dict[str, int] = {}
        """Bytes at the peak, by category."""
        self.peak_total = 0
        self.peak_place = ""
        self.kept = 0
        """Largest number of bytes that :meth:`end_action` found in its category."""

    def see(self, tensor: Tensor, category: str | None = None) -> None:
        """Count the storage of ``tensor``, if it is on the device; a storage that is known keeps its category."""
        if isinstance(tensor, DTensor) or tensor.device.type != self.device_type:
            return  # a DTensor has no memory besides its local tensor's
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), storage.nbytes()
        live = self._live.get(key)
        if live is None:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._live[key] = _Live(reference, category or self._category(), 0)
        self._resize(key, nbytes)

    def see_all(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of ``tensors`` in ``category``."""
        for tensor in tensors:
            self.see(tensor, category)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count the new size of a storage, if it is known."""
        if id(storage) in self._live:
            self._resize(id(storage), storage.nbytes())

    def keep(self, category: str) -> None:
        """Move all transient storages to ``category``: they have outlived the computation that made them."""
        for key, live in self._live.items():
            if live.category == TRANSIENTS:
                self._live[key] = live._replace(category=category)
                self.held[TRANSIENTS] -= live.nbytes
                self.held[category] += live.nbytes

    def end_action(self, category: str) -> None:
        """Do the same at the end of an action, when what ``category`` holds is kept for another action."""
        self.keep(category)
        self.kept = max(self.kept, self.held[category])

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_total, self.kept = dict(self.held), self.total, 0

    def _resize(self, key: int, nbytes: int) -> None:
        live = self._live[key]
        if nbytes == live.nbytes:
            return
        self._live[key] = live._replace(nbytes=nbytes)
        self.held[live.category] += nbytes - live.nbytes
        self.total += nbytes - live.nbytes
        if self.total > self.peak_total:
            self.peak, self.peak_total, self.peak_place = dict(self.held), self.total, self._place()

    def _forget(self, key: int) -> None:
        live = self._live.pop(key)
        self.held[live.category] -= live.nbytes
        self.total -= live.nbytes
