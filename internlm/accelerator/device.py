"""Functions that query and control the device of this process; on CPU, the control functions are no-ops."""

from __future__ import annotations

import resource

import torch

from internlm.accelerator.kinds import device_kind


def device_type() -> str:
    """Return the device type on which this process computes, such as ``"cuda"``."""
    return device_kind().name


def default_backend() -> str:
    """Return the default ``torch.distributed`` backend for this device."""
    return device_kind().backend


def device_count() -> int | None:
    """Return the number of devices of this machine; None on CPU, where processes share the cores."""
    kind = device_kind()
    return None if kind.is_host else int(kind.module.device_count())


def device_memory() -> int | None:
    """Return the total memory of the current device in bytes; None on CPU, where processes share the memory."""
    kind = device_kind()
    return None if kind.is_host else int(kind.module.get_device_properties(current_device()).total_memory)


def set_device(local_rank: int) -> None:
    """Make device ``local_rank`` of this machine the current device; a no-op on CPU."""
    kind = device_kind()
    if not kind.is_host:
        kind.module.set_device(local_rank)


def current_device() -> torch.device:
    """Return the device on which this process computes."""
    kind = device_kind()
    # Include the index: torch.device("cuda") compares unequal to the device of a tensor.
    return torch.device(kind.name) if kind.is_host else torch.device(kind.name, kind.module.current_device())


def synchronize() -> None:
    """Block until the device has finished all queued work; a no-op on CPU."""
    kind = device_kind()
    if not kind.is_host:
        kind.module.synchronize()


def empty_cache() -> None:
    """Free the unused device memory that PyTorch caches; a no-op on CPU."""
    kind = device_kind()
    if not kind.is_host:
        kind.module.empty_cache()


def peak_memory() -> int:
    """Return the peak allocated device memory in bytes; on CPU, the peak resident memory of this process."""
    kind = device_kind()
    if not kind.is_host:
        return int(kind.module.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # Linux counts in KiB
