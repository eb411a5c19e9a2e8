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
        # Small, since boxes are; the mapped files themselves count as the cache of the system.
        box, filled = torch.empty(target.shape, dtype=self.shards[0].dtype), 0
        flat = box.view(-1)
        for first, count in runs_of_box(shape, offsets, target.shape, self.segments):
            flat[filled : filled + count] = self._range(first, count)
            filled += count
        target.copy_(box)

    def _range(self, first: int, count: int) -> Tensor:
        """Return ``count`` elements of the flattened tensor of the shards from ``first`` on."""
        if len(self.shards) == 1:
            return self.shards[0].reshape(-1)[first : first + count]
        if self.axis == 0:
            size = self.shards[0].numel()
            pieces = []
            for index in range(first // size, -(-(first + count) // size)):
                start, stop = max(first - index * size, 0), min(first + count - index * size, size)
                pieces.append(self.shards[index].reshape(-1)[start:stop])
            return torch.cat(pieces)
        # Whole rows of all files, of which the columns beside one another are taken.
        columns = self.shards[0].shape[-1] * len(self.shards)
        top, bottom = first // columns, -(-(first + count) // columns)
        rows = torch.cat([shard[top:bottom] for shard in self.shards], dim=1)
        return rows.reshape(-1)[first - top * columns :][:count]
