"""Comparison of two checkpoints, of any formats and layouts, in bounded memory.

Tensors are read box by box, a few megabytes of each checkpoint at a time, and the checksums of the pieces are verified.
Elements are *different* if their bits are: a NaN equals the same NaN, and 0.0 does not equal -0.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from internlm.checkpoint.logical_tensors import LogicalTensor, Offsets, cut
from internlm.checkpoint.run_state import RunState
from internlm.checkpoint.saved_checkpoint import SavedCheckpoint

#: Elements of a tensor that are compared at a time. Comparing takes some 40 bytes of memory for each.
BOX_ELEMENTS = 1 << 21
#: Keys of a state file that say where a run saved, and not what.
PLACES = ("save_folder", "run_folder", "launcher")


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """Difference between the tensors of one name in two checkpoints."""

    name: str
    message: str
    """In words: only in one of them, another shape or dtype, or how many elements differ."""
    different: int | None = None
    """Number of different elements; None if they were not compared one by one."""
    elements: int | None = None
    first: list[int] | None = None
    """Index of the first different element in row-major order."""
    largest_absolute: float | None = None
    """Infinite if one of the elements is not finite."""
    largest_relative: float | None = None
    """Largest difference divided by the larger magnitude of both elements."""


def tensors_of(checkpoint: SavedCheckpoint) -> dict[str, TensorStorageMetadata]:
    """Return the tensors of a checkpoint by name, sorted."""
    entries = sorted(checkpoint.metadata.state_dict_metadata.items())
    return {name: stored for name, stored in entries if isinstance(stored, TensorStorageMetadata)}


def compare_tensor(
    name: str, first: SavedCheckpoint, second: SavedCheckpoint, bitwise: bool = False
) -> TensorDifference | None:
    """Compare the tensor ``name`` of two checkpoints; return None if it is bitwise equal.

    Args:
        name: Tensor that at least one of them has.
        first: One checkpoint.
        second: The other.
        bitwise: Where both have the same pieces, compare their checksums instead of reading them.

    Raises:
        DamagedCheckpointError: A piece does not verify.
    """
    one, other = (checkpoint.metadata.state_dict_metadata.get(name) for checkpoint in (first, second))
    if not (isinstance(one, TensorStorageMetadata) and isinstance(other, TensorStorageMetadata)):
        return TensorDifference(name=name, message=f"only in {(first if one else second).where}")
    for label, a, b in (
        ("shape", list(one.size), list(other.size)),
        ("dtype", _dtype(one), _dtype(other)),
    ):
        if a != b:
            return TensorDifference(name=name, message=f"{label} {a} → {b}")
    if bitwise and (same := _same_pieces(name, first, second)) is not None:
        return None if same else TensorDifference(name=name, message="different")
    total = _Total(one.size)
    for offsets, sizes in _boxes(one, first, other, second):
        total.add(offsets, *(_read(checkpoint, name, one, offsets, sizes) for checkpoint in (first, second)))
        if bitwise and total.different:
            return TensorDifference(name=name, message="different")
    return total.difference(name)


def _dtype(stored: TensorStorageMetadata) -> str:
    return str(stored.properties.dtype).removeprefix("torch.")


def _same_pieces(name: str, first: SavedCheckpoint, second: SavedCheckpoint) -> bool | None:
    """Return whether the checksums of a tensor's pieces are equal; None if they do not have the same boxes."""
    sums = [
        {(piece.offsets, piece.sizes): piece.checksum for piece in checkpoint.manifest.tensors[name].pieces}
        for checkpoint in (first, second)
        if checkpoint.manifest
    ]
    if len(sums) < 2 or sums[0].keys() != sums[1].keys():
        return None
    return sums[0] == sums[1]


def _boxes(
    one: TensorStorageMetadata, first: SavedCheckpoint, other: TensorStorageMetadata, second: SavedCheckpoint
) -> Iterator[tuple[Offsets, Offsets]]:
    """Yield boxes (offsets, sizes) that cover a tensor."""
    for stored, checkpoint in ((one, first), (other, second)):
        if checkpoint.format == 1:
            # Of its archives nothing can be read but all, so a smaller box would read them again and again.
            yield from ((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks)
            return
    # A tensor on the meta device has a shape and no memory.
    whole = torch.empty(one.size, dtype=one.properties.dtype, device="meta")
    for offsets, part in cut((0,) * len(one.size), whole, BOX_ELEMENTS):
        yield offsets, tuple(part.shape)


def _read(
    checkpoint: SavedCheckpoint, name: str, stored: TensorStorageMetadata, offsets: Offsets, sizes: Offsets
) -> Tensor:
    box = torch.empty(sizes, dtype=stored.properties.dtype)
    tensor = LogicalTensor(tuple(stored.size), stored.properties.dtype)
    tensor.add(offsets, box)
    checkpoint.read({name: tensor})
    return box


class _Total:
    """Sums of the differences of a tensor over its boxes."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.different = 0
        self.first: list[int] | None = None
        self.absolute = self.relative = 0.0

    def add(self, offsets: Offsets, one: Tensor, other: Tensor) -> None:
        """Compare a box that starts at ``offsets``."""
        bits = _bits(one), _bits(other)
        if torch.equal(*bits):
            return
        unequal = (bits[0] != bits[1]).any(dim=1)
        self.different += int(unequal.sum())
        local = torch.unravel_index(unequal.int().argmax(), one.shape)
        index = [offset + int(position) for offset, position in zip(offsets, local, strict=True)]
        # Boxes of format 1 come in any order.
        self.first = min(self.first or index, index)
        a, b = (_wide(tensor.reshape(-1)[unequal]) for tensor in (one, other))
        gap, scale = (a - b).abs(), torch.maximum(a.abs(), b.abs())
        # Where one is not finite, or the difference of both is no number, it is unbounded.
        gap = torch.where(gap.isfinite(), gap, math.inf)
        relative = torch.where(gap == 0, 0.0, torch.where(scale.isfinite(), gap / scale, math.inf))
        self.absolute, self.relative = max(self.absolute, float(gap.max())), max(self.relative, float(relative.max()))

    def difference(self, name: str) -> TensorDifference | None:
        """Return the difference of the whole tensor; None if there is none."""
        if not self.different:
            return None
        elements = self.shape.numel()
        message = (
            f"{self.different} of {elements} elements differ, first at {self.first}; by at most {self.absolute:.3g}, "
            f"relatively {self.relative:.3g}"
        )
        return TensorDifference(
            name=name,
            message=message,
            different=self.different,
            elements=elements,
            first=self.first,
            largest_absolute=self.absolute,
            largest_relative=self.relative,
        )


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, one row per element; comparing single bytes would take much longer."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.dtype.itemsize, torch.int64)
    return tensor.reshape(-1, 1).view(integer)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


# -- state ------------------------------------------------------------------------------------------------------------


def compare_states(first: RunState, second: RunState) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ, by their dotted keys: (first, second), None where one has no such key."""
    one, other = (dict(_flat(state.model_dump(mode="json", exclude={*PLACES}))) for state in (first, second))
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
