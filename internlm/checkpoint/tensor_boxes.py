"""Boxes of row-major tensors as runs in memory, also of tensors that lie between the rows of another one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segments:
    """Where a tensor lies in a fused one, in elements: segments of equal length at equal distances.

    Queries, keys and values that are stored in one matrix are such tensors: one segment each, or one per kv head.
    """

    start: int
    length: int
    stride: int

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the runs in the fused tensor (first element, count) of a run in the tensor itself."""
        while count > 0:
            segment, offset = divmod(first, self.length)
            size = min(self.length - offset, count)
            yield self.start + segment * self.stride + offset, size
            first, count = first + size, count - size


def runs_of_box(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], segments: Segments | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (first element, number of elements) of the runs in memory that make up a box of a row-major tensor.

    Args:
        shape: Shape of the tensor.
        offsets: First index of the box, by axis.
        sizes: Sizes of the box, by axis.
        segments: Where the tensor lies in a fused one, whose elements are then counted.
    """
    if math.prod(sizes) == 0:
        return
    # The fewer runs, the fewer calls of the system: axes that are covered are joined with the one before them.
    # The axes from ``inner`` on are covered, so a run is a range of the axis before them.
    inner = len(shape)
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    outer = max(inner - 1, 0)
    base = offsets[outer] * strides[outer] if shape else 0
    count = math.prod(sizes[outer:])
    for index in itertools.product(*(range(offsets[axis], offsets[axis] + sizes[axis]) for axis in range(outer))):
        first = base + sum(i * stride for i, stride in zip(index, strides, strict=False))
        if segments is None:
            yield first, count
        else:
            yield from segments.runs(first, count)
