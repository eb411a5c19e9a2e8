"""Offloading: keep tensors saved for backward in host memory until the backward pass reads them.

It applies to the first ``model.cpu_offloading`` blocks of each pipeline chunk:

1. During the forward pass of a block, the tensors that autograd saves are recorded.
2. After it, a side stream starts to copy them to the host. After the forward pass of the next block, the originals are
   freed, once the copies are complete.
3. When the backward pass of a block begins, its tensors are already being copied back to the device, and the copies
   for the preceding block are started.

Hence the device holds the saved tensors of at most two offloaded blocks. Each storage is copied once, as a whole, for
any number of saved views. On the CPU, streams are no-ops and copies are synchronous.

The host memory of a block comes in segments of :data:`SEGMENT_BYTES`, and a storage may span several of them: torch's
allocator of pinned memory rounds each allocation up to a power of two, which would waste up to half of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from internlm.accelerator import HOST, kind_of

T = TypeVar("T")

#: Bytes of a segment of host memory, a power of two. Only the last segment of a block is smaller, and rounded up.
SEGMENT_BYTES = 2**25


class ChunkOffload:
    """Offloading of the tensors that the first ``count`` blocks of a pipeline chunk save for backward.

    The chunk has ``blocks`` blocks in total. One instance serves all forward passes of the chunk, one after another.
    """

    def __init__(self, blocks: int, count: int) -> None:
        self.blocks, self.count = blocks, count
        self._last: _Saved | None = None  # saved by the previous block of the current pass

    def run(self, position: int, compute: Callable[[], T], device: torch.device, kept: Iterable[Tensor] = ()) -> T:
        """Run one block, offload its saved tensors if ``position`` < ``count``, and return its output.

        Args:
            position: Index of the block in the chunk. Blocks after index ``count`` run without this method.
            compute: Function that runs the block.
            device: Device on which the block runs.
            kept: Tensors that are not offloaded, since they stay on the device in any case.
        """
        if position == 0:
            self._last = None  # an exception may have ended the previous pass
        if position == self.count:
            return self._run_next(compute)
        saved = _Saved(device, {_storage_id(tensor) for tensor in kept}, self._last)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            output = compute()
        if self._last is not None:
            self._last.free_originals()
        saved.start_copies()
        self._last = saved
        if position == self.blocks - 1:
            self._end()
        return output

    def _run_next(self, compute: Callable[[], T]) -> T:
        """Run the first block that is not offloaded; its backward prefetches the tensors of the block before it."""
        output = compute()
        gradient = next((tensor for tensor in tensors_of(output) if tensor.requires_grad), None)
        last = self._last
        if last is not None and gradient is not None:
            gradient.register_hook(lambda _: last.fetch())
        self._end()
        return output

    def _end(self) -> None:
        """Free the device storages of the last offloaded block, and drop the reference to its saved tensors."""
        if self._last is not None:
            self._last.free_originals()
            self._last = None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in ``value``, which may nest tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict) or hasattr(value, "__dataclass_fields__"):
        for item in (value if isinstance(value, dict) else vars(value)).values():
            yield from tensors_of(item)


@dataclass(eq=False)
class _Storage:
    """Storage of saved tensors: on the device, on the host, or both."""

    original: Tensor | None  # as bytes
    host: list[Tensor] = field(default_factory=list)  # consecutive parts of the bytes, each within one segment


@dataclass(eq=False)
class _SavedTensor:
    """Tensor saved by autograd, as a view of a storage."""

    storage: _Storage
    dtype: torch.dtype
    view: tuple[int, torch.Size, tuple[int, ...]]  # offset, shape, strides
    tensor: Tensor | None = None  # from its return to the device until it is unpacked

    def rebuild(self, data: Tensor) -> None:
        """Recreate the tensor as a view of ``data``, a uint8 copy of its storage on the device."""
        self.tensor = torch.empty(0, dtype=self.dtype, device=data.device).set_(data.untyped_storage(), *self.view)


class _Saved:
    """Tensors that one block saved for its backward pass."""

    def __init__(self, device: torch.device, kept: set[int], previous: _Saved | None) -> None:
        self.device, self.kept, self.previous = device, kept, previous
        self.tensors: list[_SavedTensor] = []
        self.storages: dict[int, _Storage] = {}  # by id, which is unique while the originals are alive
        self.is_fetched = False
        self.event: Any = None

    # -- autograd's hooks ---------------------------------------------------------------------------------------------
    def pack(self, tensor: Tensor) -> _SavedTensor | Tensor:
        """Return the object that autograd saves instead of ``tensor``; ``tensor`` itself if it is not offloaded."""
        pointer = _storage_id(tensor)
        if pointer in self.kept:
            return tensor
        storage = self.storages.setdefault(pointer, _Storage(_bytes_of(tensor)))
        view = int(tensor.storage_offset()), tensor.shape, tensor.stride()
        self.tensors.append(_SavedTensor(storage, tensor.dtype, view))
        return self.tensors[-1]

    def unpack(self, saved: _SavedTensor | Tensor) -> Tensor:
        """Return the device tensor for an object that :meth:`pack` returned; prefetch the previous block's tensors."""
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        if saved.tensor is None:  # unpacked before: the graph runs backward a second time
            self._copy_back([saved])
        self._wait()
        if self.previous is not None:
            self.previous.fetch()  # overlaps with this block's backward pass
        tensor, saved.tensor = saved.tensor, None
        assert tensor is not None
        return tensor

    # -- to the host and back -----------------------------------------------------------------------------------------
    def start_copies(self) -> None:
        """Start copying all saved storages to the host."""
        storages = [(storage, storage.original) for storage in self.storages.values() if storage.original is not None]
        sizes = [original.nbytes for _, original in storages]
        with self._on_side_stream():
            for (storage, original), host in zip(storages, host_memory(sizes, self.device), strict=True):
                storage.host = host
                for part, source in zip(host, _split_like(original, host), strict=True):
                    part.copy_(source, non_blocking=True)

    def free_originals(self) -> None:
        """Free all device storages; later kernels can reuse their memory once the copies to the host are complete."""
        self._wait()
        for storage in self.storages.values():
            storage.original = None
        self.storages.clear()

    def fetch(self) -> None:
        """Start copying all saved tensors back to the device; later calls are no-ops."""
        if not self.is_fetched:
            self.is_fetched = True
            self._copy_back(self.tensors)

    def _copy_back(self, tensors: Iterable[_SavedTensor]) -> None:
        # Allocate outside of the side stream: the caching allocator can then reuse the memory on the compute stream as
        # soon as it is freed, without waiting for events.
        storages = dict.fromkeys(saved.storage for saved in tensors)
        data = {storage: _new_bytes(sum(part.nbytes for part in storage.host), self.device) for storage in storages}
        with self._on_side_stream():
            for storage, buffer in data.items():
                for part, target in zip(storage.host, _split_like(buffer, storage.host), strict=True):
                    target.copy_(part, non_blocking=True)
        for saved in tensors:
            saved.rebuild(data[saved.storage])

    @contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """Run copies on the side stream, after all work launched so far and concurrently with later work."""
        module, side = torch.get_device_module(self.device), _side_stream(self.device)
        side.wait_stream(module.current_stream())
        with module.stream(side):
            yield
        self.event = side.record_event()

    def _wait(self) -> None:
        """Make the compute stream wait for the copies last launched by :meth:`_on_side_stream`."""
        torch.get_device_module(self.device).current_stream().wait_event(self.event)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream()


def _storage_id(tensor: Tensor) -> int:
    return id(tensor.untyped_storage())  # torch keeps the object as long as the memory; a dry run has no addresses


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the whole storage of ``tensor`` as a uint8 tensor, [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def host_memory(sizes: Sequence[int], device: torch.device) -> Iterator[list[Tensor]]:
    """Allocate host memory for storages of ``sizes`` bytes, from which copies to ``device`` do not block the host.

    Yields:
        For each storage, its parts as uint8 tensors, in order; each part is within one segment.
    """
    pinned = not kind_of(device).is_host
    starts = range(0, sum(sizes), SEGMENT_BYTES)
    segments = [_new_bytes(min(SEGMENT_BYTES, sum(sizes) - start), HOST, pinned) for start in starts]
    start = 0
    for size in sizes:
        parts, end = [], start + size
        while start < end:
            index, offset = divmod(start, SEGMENT_BYTES)
            parts.append(segments[index][offset : offset + end - start])
            start += parts[-1].nbytes
        yield parts


def _split_like(data: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    return data.split([part.nbytes for part in parts])


def _new_bytes(size: int, device: torch.device, pinned: bool = False) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
