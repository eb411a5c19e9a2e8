"""Copies between host and device.

On an accelerator, kernels are queued and run later. Reading a value on the host waits until the queue is empty, after
which the device idles until the host has queued new kernels: a *host sync*. All such reads go through :func:`to_host`
or :class:`HostValues`, which count them, so that tests can state the reads of a training step.

A copy to the device does not block only if the host memory is pinned, which :func:`to_device` ensures.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from internlm.accelerator.kinds import device_kind, kind_of

_reads: Counter[str] = Counter()


def host_reads() -> Counter[str]:
    """Return the number of host syncs of this process so far, by reason."""
    return Counter(_reads)


def count_host_sync(why: str) -> None:
    """Count a host sync, for :func:`host_reads`."""
    _reads[why] += 1


def is_host(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is in host memory."""
    return kind_of(tensor.device).is_host


def to_host(tensor: Tensor, why: str) -> Tensor:
    """Return ``tensor`` in host memory, waiting until it has been computed (a host sync).

    Args:
        tensor: Tensor to read. On the CPU, it is returned itself.
        why: Reason of the read, under which it is counted.
    """
    count_host_sync(why)
    return kind_of(tensor.device).read(tensor.detach())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on ``device``, without blocking the host."""
    return tensor if tensor.device == device else kind_of(device).write(tensor, device)


def host_buffer(size: int) -> Tensor:
    """Return uninitialised host memory of ``size`` bytes, to which the device can copy without blocking."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=not device_kind().is_host)


class HostValues:
    """Values of a small device tensor, read on the host when they are first needed, and then kept.

    Args:
        tensor: Tensor that is not modified later.
        why: Reason under which the read is counted.
    """

    def __init__(self, tensor: Tensor, why: str) -> None:
        self.tensor, self.why = tensor, why
        self._values: Any = None
        self._copy: tuple[Tensor, Any] | None = None  # destination on the host, and the event after the copy

    @property
    def is_read(self) -> bool:
        """Whether the host has the values."""
        return self._values is not None

    def read(self) -> Any:
        """Return the values like ``tensor.tolist()``; a host sync if they have not been read before."""
        if self._values is None:
            self._values = to_host(self.tensor, self.why).tolist()
        return self._values

    def set(self, values: list[Any]) -> None:
        """Set the values, which the host knows already."""
        self._values = values

    def begin_copy(self) -> None:
        """Start to copy the values to the host, for :meth:`read_arrived`."""
        kind = kind_of(self.tensor.device)
        if self._values is None and not kind.is_host:
            self._copy = kind.begin_copy(self.tensor)

    def read_arrived(self) -> Any:
        """Return the values that :meth:`begin_copy` started to copy, once the copy has completed.

        This is no host sync if the device has been given other work since: it goes on with that work.
        """
        if self._values is None and self._copy is not None:
            host, event = self._copy
            event.synchronize()
            self._values, self._copy = host.tolist(), None
        return self.tensor.tolist() if self._values is None else self._values


def read_together(*values: HostValues, why: str) -> None:
    """Read several values with one host sync; those that have been read before are not read again.

    Args:
        values: Values to read, whose tensors have the same dtype.
        why: Reason under which the read is counted.
    """
    unread = [value for value in values if not value.is_read]
    if not unread:
        return
    flat = to_host(torch.cat([value.tensor.flatten() for value in unread]), why)
    with device_kind().with_values():
        parts = flat.split([value.tensor.numel() for value in unread])
        for value, part in zip(unread, parts, strict=True):
            value.set(part.view(value.tensor.shape).tolist())
