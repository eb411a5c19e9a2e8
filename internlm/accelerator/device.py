"""Functions that query and control the device of this process; on CPU, the control functions are no-ops."""

from __future__ import annotations

import os
import resource

import torch

#: Environment variable that disables accelerators when set to ``cpu``.
DEVICE_VARIABLE = "INTERNLM_DEVICE"


def device_type() -> str:
    """Return ``"cuda"`` if a CUDA device is available and ``INTERNLM_DEVICE`` is not ``cpu``, else ``"cpu"``."""
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def default_backend() -> str:
    """Return the default ``torch.distributed`` backend for this device."""
    return "nccl" if device_type() == "cuda" else "gloo"


def device_count() -> int | None:
    """Return the number of CUDA devices of this machine; None on CPU, where processes share the cores."""
    return torch.cuda.device_count() if device_type() == "cuda" else None


def device_memory() -> int | None:
    """Return the total memory of the current device in bytes; None on CPU, where processes share the memory."""
    return torch.cuda.get_device_properties(current_device()).total_memory if device_type() == "cuda" else None


def set_device(local_rank: int) -> None:
    """Make CUDA device ``local_rank`` of this machine the current device; a no-op on CPU."""
    if device_type() == "cuda":
        torch.cuda.set_device(local_rank)


def current_device() -> torch.device:
    """Return the device on which this process computes."""
    if device_type() == "cuda":
        # Include the index: torch.device("cuda") compares unequal to the device of a tensor.
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def synchronize() -> None:
    """Block until the device has finished all queued work; a no-op on CPU."""
    if device_type() == "cuda":
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Free the unused device memory that PyTorch caches; a no-op on CPU."""
    if device_type() == "cuda":
        torch.cuda.empty_cache()


def peak_memory() -> int:
    """Return the peak allocated device memory in bytes; on CPU, the peak resident memory of this process."""
    if device_type() == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # Linux counts in KiB
