"""Copies from the host to a device: pinned first, then not blocking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.accelerator import DeviceKind, pretending, to_device

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Recording(DeviceKind):
    """Kind of a device without memory, which records what is pinned for it; pinning itself needs a GPU."""

    pinned: list[Tensor] = field(default_factory=list)

    def pin(self, tensor: Tensor) -> Tensor:
        """Record ``tensor`` and return a copy."""
        self.pinned.append(tensor)
        return tensor.clone()


class Copies(TorchDispatchMode):
    """Record of the source of each copy to another device, and whether it may block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            self.seen.append((args[0].data_ptr(), bool(options.get("non_blocking"))))
        return func(*args, **options)


def test_a_copy_to_a_device_comes_from_pinned_memory_and_does_not_block() -> None:
    recording = Recording(name="meta", backend="gloo")
    tensor = torch.arange(4)
    with pretending(recording), Copies() as copies:
        copied = to_device(tensor, META)
        assert to_device(copied, META) is copied
    assert [source is tensor for source in recording.pinned] == [True]
    assert [(source != tensor.data_ptr(), non_blocking) for source, non_blocking in copies.seen] == [(True, True)]
    assert copied.device == META
