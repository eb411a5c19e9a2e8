"""Pretended accelerator, on which tensors have shapes and dtypes but no memory and no values.

Code that runs on it takes the paths of CUDA. Tensors must be fake (``torch_private.fake_tensors``): operators compute
shapes only. Reads on the host return zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm.accelerator.kinds import DeviceKind, device_kind, pretending
from internlm.utils.torch_private import real_tensors, register_python_device

NAME = "sim"


class Stream:
    """Stream of the pretended device; nothing runs, so nothing is waited for."""

    def __init__(self, *options: Any, **named: Any) -> None:
        del options, named

    def wait_stream(self, stream: Stream) -> None:
        """Do nothing."""

    def wait_event(self, event: Event) -> None:
        """Do nothing."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event."""
        return event or Event()


class Event:
    """Event of the pretended device, which has always been reached."""

    def __init__(self, *options: Any, **named: Any) -> None:
        del options, named

    def record(self, stream: Stream | None = None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Do nothing."""

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing."""

    def elapsed_time(self, end: Event) -> float:
        """Return 1 ms, so that rates are finite."""
        return 1.0


class PretendedModule:
    """Device module, the counterpart of ``torch.cuda``."""

    Stream, Event = Stream, Event

    def is_available(self) -> bool:
        """Return whether a dry run is going on: torch's checkpoints, for one, choose the first available device."""
        return device_kind() is PRETENDED

    def is_initialized(self) -> bool:
        """Return True."""
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """Return 1."""
        return 1

    def current_device(self) -> int:
        """Return 0."""
        return 0

    def set_device(self, index: int) -> None:
        """Do nothing."""

    def synchronize(self, device: Any = None) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing."""

    def max_memory_allocated(self) -> int:
        """Return 0."""
        return 0

    def current_stream(self, device: Any = None) -> object:
        """Return a stream."""
        return Stream()

    def stream(self, stream: object) -> AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return nullcontext()

    def manual_seed(self, seed: int) -> None:
        """Do nothing."""

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Return an empty state."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Do nothing."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the dtypes of automatic mixed precision."""
        return [torch.bfloat16, torch.float16]


_host_depth = 0


def in_host_memory() -> bool:
    """Return whether tensors that are created now have values, in host memory."""
    return _host_depth > 0


@contextmanager
def _host_memory() -> Iterator[None]:
    global _host_depth
    _host_depth += 1
    try:
        with real_tensors():
            yield
    finally:
        _host_depth -= 1


@dataclass(frozen=True, kw_only=True)
class PretendedKind(DeviceKind):
    """Kind of the pretended accelerator."""

    def read(self, tensor: Tensor) -> Tensor:
        """Return zeros in host memory."""
        with _host_memory():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def write(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of the same shape and dtype on the device."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def pin(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``."""
        return tensor

    def begin_copy(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Return zeros in host memory, and an event."""
        return self.read(tensor), Event()

    def with_values(self) -> AbstractContextManager[None]:
        """Return a context manager within which tensors have values."""
        return _host_memory()


PRETENDED = PretendedKind(name=NAME, backend="fake", has_values=False)


@contextmanager
def pretended_device() -> Iterator[None]:
    """Compute on the pretended accelerator within the ``with`` block; tensors must be fake."""
    _register()
    # Autograd has threads for the devices that it found before the first backward pass of the process, which may have
    # been another one. On the calling thread, backward passes also have a stack that names the line of the step.
    with pretending(PRETENDED), torch.autograd.set_multithreading_enabled(False):
        yield


@functools.cache
def _register() -> None:
    register_python_device(NAME, PretendedModule())
