"""A contiguous run of a flattened tensor as boxes of the tensor itself. Pure arithmetic.

ZeRO cuts flat buffers anywhere, so a shard may begin and end within a row. In the tensor's own axes such a run is at
most 2 · dims − 1 boxes: a part of the first row, whole rows, a part of the last row, and so on inwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Offsets and sizes in each dimension, and the run [start, stop) of the flattened tensor that it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of elements [start, stop) of a row-major tensor of ``shape``."""
    if start >= stop:
        return
    if len(shape) == 0:
        yield Box((), (), start, stop)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows: first … last - 1
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop, row)
        return
    yield from _within_row(shape, first - 1, start, first * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row, last * row)
    yield from _within_row(shape, last, last * row, stop, row)


def _within_row(shape: Sequence[int], index: int, start: int, stop: int, row: int) -> Iterator[Box]:
    base = index * row
    for box in boxes_of_run(shape[1:], start - base, stop - base):
        yield Box((index, *box.offsets), (1, *box.sizes), box.start + base, box.stop + base)
