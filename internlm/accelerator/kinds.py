"""Kinds of devices: what each kind can do, and which one this process uses.

Code should ask for a capability, such as ``is_host``, rather than compare device types.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Environment variable that disables accelerators when set to ``cpu``.
DEVICE_VARIABLE = "INTERNLM_DEVICE"


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """Kind of device, with what code may rely on when tensors are on it."""

    name: str
    """Device type, as in ``torch.device(name)``."""
    backend: str
    """Default backend of ``torch.distributed``."""
    has_values: bool = True
    """Whether tensors have memory and values; False in a dry run."""
    is_host: bool = False
    """Whether tensors are in host memory, so that reading them needs no copy, and kernels run when they are called."""

    @property
    def module(self) -> ModuleType:
        """Torch's module for this kind, such as ``torch.cuda``."""
        module: ModuleType = torch.get_device_module(self.name)
        return module

    @property
    def adds_wide_products(self) -> bool:
        """Whether ``torch.addmm`` can add a product of half-precision factors to a float32 matrix (``out_dtype``)."""
        return not self.is_host and torch.version.hip is None  # torch has no such kernel on the CPU and for ROCm

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Compute capability of the current device, such as (8, 0); None if kernels have no such limit."""
        return torch.cuda.get_device_capability() if self is CUDA else None

    def device_id(self) -> str | None:
        """Return an identifier of the current device, different from that of any other; None if it has none."""
        if self is not CUDA:
            return None
        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)

    def read(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this kind in host memory, waiting until it has been computed."""
        return tensor if self.is_host else tensor.cpu()

    def write(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Copy a host tensor to a device of this kind, without blocking the host."""
        return tensor.to(device) if self.is_host else self.pin(tensor).to(device, non_blocking=True)

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a host tensor in memory that devices of this kind can read without blocking the host."""
        return tensor if self.is_host or tensor.is_pinned() else tensor.pin_memory()

    def with_values(self) -> AbstractContextManager[None]:
        """Return a context manager within which host tensors have values, also in a dry run."""
        return nullcontext()

    def begin_copy(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Start to copy a tensor of this kind to host memory; return the copy, and an event after it."""
        host = torch.empty_like(tensor, device=CPU.name, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = self.module.Event()
        event.record()
        return host, event


CPU = DeviceKind(name="cpu", backend="gloo", is_host=True)
CUDA = DeviceKind(name="cuda", backend="nccl")

#: Device of host memory.
HOST = torch.device(CPU.name)

#: Known kinds by device type. A tensor on any other type, such as ``meta``, is treated like one on an accelerator.
_KINDS = {kind.name: kind for kind in (CPU, CUDA)}
_pretended: DeviceKind | None = None


@contextmanager
def pretending(kind: DeviceKind) -> Iterator[None]:
    """Compute on devices of ``kind`` within the ``with`` block, whatever this machine has."""
    global _pretended, _KINDS
    before = _pretended, _KINDS
    _pretended, _KINDS = kind, {**_KINDS, kind.name: kind}
    try:
        yield
    finally:
        _pretended, _KINDS = before


def device_kind() -> DeviceKind:
    """Return the kind of device on which this process computes.

    It is CUDA if a CUDA device is available and ``INTERNLM_DEVICE`` is not ``cpu``, else the CPU.
    """
    if _pretended is not None:
        return _pretended
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    return CUDA if wanted != CPU.name and torch.cuda.is_available() else CPU


def why_no_device(name: str) -> str:
    """Return the reason why this process cannot compute on devices of type ``name``; empty if it can."""
    if name in (CPU.name, device_kind().name):
        return ""
    if os.environ.get(DEVICE_VARIABLE) == CPU.name:
        return f"{DEVICE_VARIABLE} is {CPU.name!r}"
    if name == CUDA.name and not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return f"no {name} device is visible to this process"


def kind_of(device: torch.device | str) -> DeviceKind:
    """Return the kind of ``device``."""
    name = torch.device(device).type
    return _KINDS.get(name) or DeviceKind(name=name, backend="")
