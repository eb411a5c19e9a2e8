"""Functions that query and control the device of this process; on CPU, the control functions are no-ops."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from internlm.accelerator.kinds import device_kind

#: Folder of the cgroup (v2) of a container, which limits its memory.
CGROUP = Path("/sys/fs/cgroup")


def device_type() -> str:
    """Return the device type on which this process computes, such as ``"cuda"``."""
    return device_kind().name


def default_backend() -> str:
    """Return the default ``torch.distributed`` backend for this device."""
    return device_kind().backend


def device_count() -> int | None:
    """Return the number of devices visible to this process; None on CPU, where processes share the cores."""
    kind = device_kind()
    return None if kind.is_host else int(kind.module.device_count())


def device_memory() -> int | None:
    """Return the total memory of the current device in bytes; None on CPU, where processes share the memory."""
    kind = device_kind()
    return None if kind.is_host else int(kind.module.get_device_properties(current_device()).total_memory)


def free_memory() -> int | None:
    """Return how many bytes this process may still allocate on its device; None if that is not known.

    On CPU, the processes of a machine share its memory in equal parts.
    """
    kind = device_kind()
    if not kind.is_host:
        if not hasattr(kind.module, "mem_get_info"):
            return None
        # PyTorch keeps memory that it freed, and allocates from it first.
        unused = kind.module.memory_reserved() - kind.module.memory_allocated()
        return int(kind.module.mem_get_info(current_device())[0] + unused)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    size = {name: int(rest.split()[0]) * 2**10 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = size["MemTotal"], size["MemAvailable"]
    if (limit := _cgroup_limit()) is not None:
        total, free = min(total, limit[0]), min(free, limit[1])
    # By the total, since the other processes may have allocated their part already, or not yet.
    return min(free, total // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cgroup_limit() -> tuple[int, int] | None:
    """Return the memory limit of this container and how much of it is free, in bytes; None without a limit."""
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None
    # Cached files count as used, but the kernel drops them where memory is short.
    cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return limit, max(limit - used + cached, 0)


def set_device(index: int) -> None:
    """Make device ``index`` of those visible to this process the current device; a no-op on CPU."""
    kind = device_kind()
    if not kind.is_host:
        kind.module.set_device(index)


def current_device() -> torch.device:
    """Return the device on which this process computes."""
    kind = device_kind()
    # Include the index: torch.device("cuda") compares unequal to the device of a tensor.
    return torch.device(kind.name) if kind.is_host else torch.device(kind.name, kind.module.current_device())


def with_values() -> AbstractContextManager[None]:
    """Return a context manager within which host tensors have values, also in a dry run."""
    return device_kind().with_values()


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


# -- random generator of the device -----------------------------------------------------------------------------------
def fork_rng() -> AbstractContextManager[None]:
    """Return a context manager that restores the states of torch's generators at its end: CPU and current device."""
    kind = device_kind()
    if kind.is_host:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[current_device()], device_type=kind.name)


def device_rng_state() -> dict[str, Tensor]:
    """Return the state of the device's generator by device type; empty on CPU, whose generator is torch's default."""
    kind = device_kind()
    return {} if kind.is_host else {kind.name: kind.module.get_rng_state()}


def set_device_rng_state(states: Mapping[str, Tensor]) -> None:
    """Restore a result of :func:`device_rng_state`; a no-op if ``states`` has none for this type of device."""
    kind = device_kind()
    if not kind.is_host and kind.name in states:
        kind.module.set_rng_state(states[kind.name])


def profiler_activities() -> list[ProfilerActivity]:
    """Return what a profiler must record: the host, and the kernels of the device."""
    return [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not device_kind().is_host)
