"""Tensors of a checkpoint as those of a Hugging Face folder: read piece by piece, converted, merged and normalised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.nn import functional as F

from internlm.checkpoint.logical_tensors import LogicalTensor, Offsets, cut
from internlm.checkpoint.saved_checkpoint import SavedCheckpoint
from internlm.checkpoint.tensor_boxes import runs_of_box
from internlm.config.schema import ModelConfig
from internlm.core.parallel.lora import merged
from internlm.model.hf_tensors import HFTensor
from internlm.utils.dtype import wide
from internlm.utils.errors import CheckpointError, Problem

#: Elements of a head that are normalised at a time.
_FOLDED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ExportedTensor:
    """Tensor to write."""

    hf: HFTensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ExportReader:
    """Reader of the tensors of a checkpoint as those of a Hugging Face folder.

    Args:
        checkpoint: The checkpoint.
        config: ``model`` section of its decoder.
    """

    def __init__(self, checkpoint: SavedCheckpoint, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config
        # The last tensor that was read as a whole: several of theirs are parts of it.
        self._name, self._whole = "", torch.empty(0)
        # Used again for each tensor: the first use of new memory takes about as long as reading into it.
        self._memory = torch.empty(0, dtype=torch.uint8)

    def blocks(self, row: ExportedTensor) -> Iterator[Tensor]:
        """Yield contiguous tensors that make up a tensor, one after the other; each is valid until the next."""
        # A piece of a few megabytes is still in the cache of the processor when it is written.
        if pieces := self._pieces(row):
            self._name = ""  # its memory is used
            for piece in pieces:
                yield self._read_box(row, tuple(piece.offsets), piece.sizes)
        else:
            yield self._read_part(row)

    def _pieces(self, row: ExportedTensor) -> list[ChunkStorageMetadata]:
        """Return the pieces of the checkpoint that make up a tensor in the order of its memory, if there are such."""
        stored, name = self._stored(row), f"model/{row.hf.ours}"
        if row.hf.reorders or self._merges(name):
            return []
        shape = row.hf.part_shape(stored.size)
        begin = [0] * len(shape)
        if row.hf.part is not None:
            begin[row.hf.part.axis] = row.hf.part.start
        runs = [*runs_of_box(stored.size, begin, shape)]
        if len(runs) != 1:
            return []
        ((position, count),) = runs
        end, found = position + count, []
        for first, size, piece in sorted(_runs(stored), key=lambda run: run[0]):
            if first == position and first + size <= end:
                found.append(piece)
                position += size
        # Rows are normalised as a whole.
        is_cut = self._folds(row) and any(piece.sizes[-1] != shape[-1] for piece in found)
        return [] if position != end or is_cut else found

    def _read_part(self, row: ExportedTensor) -> Tensor:
        """Return a tensor that is part of one which is read as a whole."""
        if row.hf.ours != self._name:
            self._whole = torch.empty(0)  # before there is a second one
            shape = self._stored(row).size
            self._whole, self._name = self._read_box(row, (0,) * len(shape), shape), row.hf.ours
        return row.hf.of(self._whole).contiguous()

    def _stored(self, row: ExportedTensor) -> TensorStorageMetadata:
        stored = self._checkpoint.metadata.state_dict_metadata[f"model/{row.hf.ours}"]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def _folds(self, row: ExportedTensor) -> bool:
        return row.hf.ours == "output.weight" and self._config.norm_head

    def _merges(self, name: str) -> bool:
        return f"{name.removesuffix('.weight')}.lora_a.weight" in self._checkpoint.metadata.state_dict_metadata

    def _read(self, name: str) -> Tensor:
        """Read a tensor of the checkpoint into memory of its own."""
        stored = self._checkpoint.metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        self._checkpoint.read({name: LogicalTensor.whole(whole)})
        return whole

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight of a linear with its adapter added."""
        assert self._config.lora is not None, "_rows refuses adapters that the config does not name"
        a, b = (self._read(f"{name.removesuffix('.weight')}.lora_{half}.weight") for half in "ab")
        return merged(weight, a, b, self._config.lora.alpha / self._config.lora.rank)

    def _read_box(self, row: ExportedTensor, offsets: Offsets, sizes: Sequence[int]) -> Tensor:
        """Read a box of our tensor, or all of it, in the dtype to write."""
        stored, name = self._stored(row), f"model/{row.hf.ours}"
        folds, merges = self._folds(row), self._merges(name)
        # Reading converts; a head is normalised as the model does, which stores it in its own dtype.
        box = self._empty(torch.Size(sizes), stored.properties.dtype if folds or merges else row.dtype)
        logical = LogicalTensor(tuple(stored.size), box.dtype)
        logical.add(offsets, box)
        self._checkpoint.read({name: logical})
        if merges:
            box = self._merged(name, box).to(row.dtype)
        if folds:
            for part in box.split(max(_FOLDED_ELEMENTS // box.shape[1], 1)):
                part.copy_(F.normalize(part.to(wide(part.dtype)), dim=-1))
            box = box.to(row.dtype)
        # Infinite weights would show in a server, long after the export.
        if row.dtype.itemsize < stored.properties.dtype.itemsize and not _is_finite(box):
            message = f"has values that {str(row.dtype).removeprefix('torch.')} cannot hold"
            raise CheckpointError(
                Problem(f"{self._checkpoint.where}: {name}", message, "Use --dtype bfloat16 or float32")
            )
        return box

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(0)
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(shape)


def _runs(stored: TensorStorageMetadata) -> Iterator[tuple[int, int, ChunkStorageMetadata]]:
    """Yield the pieces of a tensor that are runs of its memory, with their first element and their size."""
    for piece in stored.chunks:
        runs = [*itertools.islice(runs_of_box(stored.size, piece.offsets, piece.sizes), 2)]
        if len(runs) == 1:
            yield *runs[0], piece


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for _, part in cut((0,) * tensor.dim(), tensor, _FOLDED_ELEMENTS))
