"""Saved activations that wait for the backward pass in host memory.

1. While a block runs forward, what autograd saves in it is noted.
2. When it ends, a side stream begins to copy that to the host. When the next block ends, the copies are done, and the
   originals are let go.
3. When a block runs backward, what it saved is on its way back already, and that of the block before it sets out.

So there is never more on the device than what two blocks saved. Whole storages are copied, each once, however many
views of it are saved. On the CPU streams do nothing, and copies are done when they are begun.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Offloading:
    """The first ``count`` blocks of a chunk, in one forward pass. What others keep anyway, ``shared``, stays."""

    def __init__(self, count: int, shared: Iterable[Tensor]) -> None:
        self.count = count
        self._shared = {_at(tensor) for tensor in shared} if count else set()
        self._last: _Saved | None = None

    def run(self, place: int, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The output of the block at ``place`` of the chunk."""
        if place >= self.count:
            y = block(x)
            if place == self.count:
                self._fetch_with_gradient(y)
                self.finish()
            return y
        saved = _Saved(x.device, self._shared, self._last)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            y = block(x)
        self.finish()
        saved.begin_copies()
        self._last = saved
        return y

    def finish(self) -> None:
        """The last block's copies shall be done, and its originals are let go."""
        if self._last is not None:
            self._last.let_go()

    def _fetch_with_gradient(self, y: Tensor) -> None:
        """What the last block saved comes back under the block after it, whose output is ``y``."""
        last = self._last
        if last is not None and y.requires_grad:
            y.register_hook(lambda _: last.fetch())


@dataclass(eq=False)
class _Store:
    """A storage: here, on the host, or both."""

    original: Tensor | None  # as bytes
    host: Tensor | None = None


@dataclass(eq=False)
class _Parked:
    """A tensor that autograd saved: a view of a storage."""

    store: _Store
    dtype: torch.dtype
    view: tuple[int, torch.Size, tuple[int, ...]]  # offset, shape, strides
    tensor: Tensor | None = None  # once it is back, until it is taken

    def see(self, data: Tensor) -> None:
        """Take ``data`` for the storage."""
        self.tensor = torch.empty(0, dtype=self.dtype, device=data.device).set_(data.untyped_storage(), *self.view)


class _Saved:
    """What one block saved."""

    def __init__(self, device: torch.device, shared: set[int], before: _Saved | None) -> None:
        self.device, self.shared, self.before = device, shared, before
        self.parked: list[_Parked] = []
        self.stores: dict[int, _Store] = {}  # by address, which is theirs as long as the originals are here
        self.is_coming = False
        self.event: Any = None

    # -- autograd's hooks ---------------------------------------------------------------------------------------------
    def pack(self, tensor: Tensor) -> _Parked | Tensor:
        """What autograd is to save instead of ``tensor``."""
        at = _at(tensor)
        if at in self.shared:
            return tensor
        store = self.stores.setdefault(at, _Store(_bytes_of(tensor)))
        view = int(tensor.storage_offset()), tensor.shape, tensor.stride()
        self.parked.append(_Parked(store, tensor.dtype, view))
        return self.parked[-1]

    def unpack(self, saved: _Parked | Tensor) -> Tensor:
        """The tensor itself."""
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        if saved.tensor is None:  # it was taken before
            self._bring_back([saved])
        self._wait()
        if self.before is not None:
            self.before.fetch()
        tensor, saved.tensor = saved.tensor, None
        assert tensor is not None
        return tensor

    # -- there and back -----------------------------------------------------------------------------------------------
    def begin_copies(self) -> None:
        """Begin to copy everything to the host."""
        with self._on_side_stream():
            for store in self.stores.values():
                assert store.original is not None
                store.host = torch.empty_like(store.original, device="cpu", pin_memory=self.device.type != "cpu")
                store.host.copy_(store.original, non_blocking=True)

    def let_go(self) -> None:
        """Whatever runs from now on may overwrite the originals."""
        self._wait()
        for store in self.stores.values():
            store.original = None
        self.stores.clear()

    def fetch(self) -> None:
        """Begin to bring everything back, if that was not begun."""
        if not self.is_coming:
            self.is_coming = True
            self._bring_back(self.parked)

    def _bring_back(self, parked: Iterable[_Parked]) -> None:
        # The memory is the computing stream's own, so it can be used there again at once when it is given up.
        data = {each.store: torch.empty_like(_host(each.store), device=self.device) for each in parked}
        with self._on_side_stream():
            for store, buffer in data.items():
                buffer.copy_(_host(store), non_blocking=True)
        for each in parked:
            each.see(data[each.store])

    @contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """Copies in the block are made after all that was asked for so far, beside what is asked for next."""
        module, side = torch.get_device_module(self.device), _side_stream(self.device)
        side.wait_stream(module.current_stream())
        with module.stream(side):
            yield
        self.event = side.record_event()

    def _wait(self) -> None:
        """What is asked for next waits for the copies."""
        torch.get_device_module(self.device).current_stream().wait_event(self.event)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream()


def _at(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host(store: _Store) -> Tensor:
    assert store.host is not None
    return store.host
