"""Tensors whose shards lie in several files that are mapped into memory: they are read box by box, as if whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.checkpoint.safetensors_files import DTYPES
from internlm.checkpoint.tensor_boxes import Segments, runs_of_box

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardedTensor:
    """Tensor of several files."""

    shape: tuple[int, ...]
    shards: tuple[Tensor, ...]
    axis: int = 0
    """Axis along which the shards, of equal shapes, make up a tensor."""
    segments: Segments | None = None
    """Where this tensor lies in that of the shards; None: it is all of it."""

    @property
    def dtype(self) -> str:
        """Name of the dtype in safetensors files, or torch's for others."""
        return _NAMES.get(self.shards[0].dtype, str(self.shards[0].dtype))

    def read_box(self, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        """Read a box, and convert it to the dtype of ``target``.

        Args:
            shape: Shape that the tensor is viewed as.
            offsets: First index of the box, by axis of ``shape``.
            target: Memory to read into, of the sizes of the box.
        """
        # A box is small; the mapped files themselves count as the cache of the system.
        is_same = target.is_contiguous() and target.dtype == self.shards[0].dtype and target.is_cpu
        box, filled = target if is_same else torch.empty(target.shape, dtype=self.shards[0].dtype), 0
        flat = box.view(-1)
        for first, count in runs_of_box(shape, offsets, target.shape, self.segments):
            self._copy_range(first, flat[filled : filled + count])
            filled += count
        if not is_same:
            target.copy_(box)

    def _copy_range(self, first: int, target: Tensor) -> None:
        """Copy elements of the flattened tensor of the shards, from ``first`` on, to the vector ``target``."""
        count = len(target)
        if self.axis == 0 or len(self.shards) == 1:
            size, filled = self.shards[0].numel(), 0
            for index in range(first // size, -(-(first + count) // size)):
                start, stop = max(first - index * size, 0), min(first + count - index * size, size)
                target[filled : filled + stop - start] = self.shards[index].reshape(-1)[start:stop]
                filled += stop - start
            return
        # Whole rows of all files, of which the columns lie beside one another.
        width = self.shards[0].shape[-1]
        columns = width * len(self.shards)
        top, bottom = first // columns, -(-(first + count) // columns)
        is_whole = first % columns == 0 and count % columns == 0
        rows = target.view(-1, columns) if is_whole else target.new_empty(bottom - top, columns)
        for index, shard in enumerate(self.shards):
            rows[:, index * width : (index + 1) * width] = shard[top:bottom]
        if not is_whole:
            target.copy_(rows.view(-1)[first - top * columns :][:count])
