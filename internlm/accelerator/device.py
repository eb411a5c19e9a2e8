"""The device of this process, over ``torch.accelerator``. On CPU, synchronising and emptying a cache are no-ops."""

from __future__ import annotations

import os

import torch

#: Set to ``cpu`` to leave accelerators unused.
DEVICE_VARIABLE = "INTERNLM_DEVICE"


def device_type() -> str:
    """``"cuda"`` where CUDA devices are there and wanted, else ``"cpu"``."""
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def default_backend() -> str:
    """The ``torch.distributed`` backend of this device."""
    return "nccl" if device_type() == "cuda" else "gloo"


def device_count() -> int | None:
    """Devices on this machine; None on CPU, where any number of processes may share the cores."""
    return torch.cuda.device_count() if device_type() == "cuda" else None


def set_device(local_rank: int) -> None:
    """Make the ``local_rank``-th device of this machine the current one."""
    if device_type() == "cuda":
        torch.cuda.set_device(local_rank)


def current_device() -> torch.device:
    """The device that this process computes on."""
    if device_type() == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def synchronize() -> None:
    """Wait until the device has done all work queued so far."""
    if device_type() == "cuda":
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give cached, unused device memory back."""
    if device_type() == "cuda":
        torch.cuda.empty_cache()
