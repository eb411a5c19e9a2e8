"""Placement of a parameter: its global shape, this rank's shard, and the slices that make up the shard.

Every parameter has one :class:`ParamPlacement`, set when the parameter is created
(:func:`internlm.core.parallel.place`). Gradient reduction, gradient clipping, ZeRO, checkpoints and initialisation all
read it; nothing is inferred from names or module types.

A *shard* is the part of a tensor that one rank holds. A *slice* is a box in the logical tensor, given by offsets and
sizes. ZeRO splits flat buffers at any element, so a shard may begin and end within a row. A range of the flattened
tensor consists of at most 2 · dims − 1 slices: the end of the first row, whole rows, the beginning of the last row, and
likewise within the first and the last row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from internlm.core.context.layout import ParallelMode


@dataclass(frozen=True)
class TensorSlice:
    """Slice of a tensor: offsets and sizes by dimension, and the range [start, stop) of its elements when flattened."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def slices_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[TensorSlice]:
    """Yield the slices that make up elements [start, stop) of a flattened row-major tensor of shape ``shape``."""
    if start >= stop:
        return
    if len(shape) == 0:
        yield TensorSlice((), (), start, stop)
        return
    row_size = math.prod(shape[1:])
    first, last = -(-start // row_size), stop // row_size  # whole rows: first … last - 1
    if first > last:  # the range lies within one row
        yield from _slices_within_row(shape, last, start, stop, row_size)
        return
    yield from _slices_within_row(shape, first - 1, start, first * row_size, row_size)
    if first < last:
        offsets, sizes = (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        yield TensorSlice(offsets, sizes, first * row_size, last * row_size)
    yield from _slices_within_row(shape, last, last * row_size, stop, row_size)


def _slices_within_row(shape: Sequence[int], row: int, start: int, stop: int, row_size: int) -> Iterator[TensorSlice]:
    base = row * row_size
    for inner in slices_of_range(shape[1:], start - base, stop - base):
        yield TensorSlice((row, *inner.offsets), (1, *inner.sizes), inner.start + base, inner.stop + base)


@dataclass(frozen=True)
class FusedTensor:
    """Larger tensor of which a parameter is a range along one axis, as wk is of wqkv.

    The parameter has the initial values of its range, so that they do not depend on whether a model is fused.
    """

    module: str
    """Name of its module, which would be in the place of the parameter's own module."""
    axis: int
    start: int
    """Start of the range."""
    size: int
    """Size of the axis."""

    def name_of(self, name: str) -> str:
        """Return the logical name of the tensor for the parameter with logical name ``name``."""
        *outer, _, own = name.split(".")
        return ".".join((*outer, self.module, own))

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor for a parameter of ``shape``."""
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def slice_of(self, own: TensorSlice) -> TensorSlice:
        """Return a slice of the parameter as a slice of the tensor; ``start`` and ``stop`` stay."""
        offsets = list(own.offsets)
        offsets[self.axis] += self.start
        return replace(own, offsets=tuple(offsets))


@dataclass(frozen=True)
class Init:
    """Distribution of a parameter's initial values: normal, or constant if ``std`` is 0."""

    mean: float = 0.0
    std: float = 0.0
    fused: FusedTensor | None = None
    """Tensor whose initial values it takes; None: it has values of its own."""


def normal(std: float) -> Init:
    """Return the normal distribution with mean 0 and standard deviation ``std``."""
    return Init(0.0, std)


def constant(value: float) -> Init:
    """Return the distribution in which every element is ``value``."""
    return Init(value)


@dataclass(frozen=True)
class ShardSpec:
    """Split of a tensor over the ranks of a group, and the index of this rank's shard.

    Shards are equal parts along ``axis``. If ``axis`` is None, the tensor is split as a matrix, whose rows are all axes
    but the last: each shard has ⌈rows / count⌉ rows, and the last shards may end with padding rows of zeros.
    """

    mode: ParallelMode
    index: int
    count: int
    axis: int | None = None


@dataclass(frozen=True)
class ParamPlacement:
    """Placement of a parameter: global shape, this rank's shard, and the mode over which its gradient is summed."""

    global_shape: tuple[int, ...]
    init: Init | None
    """Distribution of the initial values; None: the parameter keeps the values with which it was created."""
    _: KW_ONLY
    shard: ShardSpec | None = None
    """How the parameter is split; None: every rank holds the whole parameter."""
    partial_over: ParallelMode | None = None
    """Mode over whose group the gradient is summed in addition to the data-parallel reduction; None: no such mode."""
    is_matrix: bool = True
    """False for norms and biases, so that weight decay can exclude them."""
    is_hidden: bool = False
    """True for matrices between hidden layers (not embedding or head), which Muon may update."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Global shape as a matrix, (rows, columns): all axes but the last form the rows."""
        return self._rows, self.global_shape[-1]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's shard, padding included."""
        if self.shard is None:
            return self.global_shape
        if self.shard.axis is None:
            # Rounded up, so that any number of ranks can split any matrix: padding is better than rejecting the layout.
            return (-(-self._rows // self.shard.count), self.global_shape[-1])
        shape = list(self.global_shape)
        shape[self.shard.axis] //= self.shard.count
        return tuple(shape)

    def slices(self, start: int, stop: int) -> Iterator[TensorSlice]:
        """Yield the slices of the global tensor that make up elements [start, stop) of this rank's flattened shard.

        Padding is skipped. The ``offsets`` of a slice refer to the global tensor, ``start`` and ``stop`` to the shard.
        """
        if self.shard is None or self.shard.axis is None:
            # The shard is one range of the flattened global tensor, and padding lies beyond ``last``.
            first, last = self._range
            for tensor_slice in slices_of_range(self.global_shape, first + start, min(first + stop, last)):
                yield replace(tensor_slice, start=tensor_slice.start - first, stop=tensor_slice.stop - first)
            return
        axis, shape = self.shard.axis, self.local_shape
        for tensor_slice in slices_of_range(shape, start, stop):
            offsets = list(tensor_slice.offsets)
            offsets[axis] += self.shard.index * shape[axis]
            yield replace(tensor_slice, offsets=tuple(offsets))

    def shard_of(self, whole: Tensor) -> Tensor:
        """Return this rank's shard of ``whole``, a tensor of the global shape, as a view without padding."""
        if self.shard is None:
            return whole
        if self.shard.axis is None:
            first, last = self._range
            return whole.view(-1)[first:last].view(-1, whole.shape[-1])
        length = self.local_shape[self.shard.axis]
        return whole.narrow(self.shard.axis, self.shard.index * length, length)

    @property
    def _rows(self) -> int:
        return math.prod(self.global_shape[:-1])

    @property
    def _range(self) -> tuple[int, int]:
        """Range of the flattened global tensor that this rank holds; defined if ``shard`` is None or splits rows."""
        total, size = math.prod(self.global_shape), math.prod(self.local_shape)
        first = min(self.shard.index * size, total) if self.shard else 0
        return first, min(first + size, total)
