"""How the parameters of a flat buffer lie in it, and who owns which part: pure arithmetic.

A buffer is cut into buckets, each reduced and gathered at once. A bucket is cut into runs, of which rank r of the zero
group owns run r. For two ranks (``|`` parts the runs, ``‖`` the buckets, ``·`` is padding)::

    by element      w0 w0 w0 w1 | w1 w1 w1 w2 ‖ w2 w3 w3 w3 | w3 w3 ·  ·     runs of a bucket are equally long
    by parameter    w0 w0 w0 | w1 w1 w1 w1 ‖ w3 w3 w3 w3 w3 | w2 w2          every parameter is one rank's

By element nothing is wasted, and one collective serves a bucket. By parameter an owner has whole matrices, as some
optimizers need; runs are as long as the parameters happen to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from internlm.config.schema import HybridZeroConfig

ALIGNMENT = 64  # elements; a run starts on a cache line whatever its type


@dataclass(frozen=True)
class Bucket:
    """Where its runs begin, and, last of all, where it ends: elements of the flat buffer."""

    cuts: tuple[int, ...]

    @property
    def first(self) -> int:
        """Its first element."""
        return self.cuts[0]

    @property
    def last(self) -> int:
        """One past its last element."""
        return self.cuts[-1]

    @property
    def is_even(self) -> bool:
        """Whether all runs are equally long."""
        return len({stop - start for start, stop in pairwise(self.cuts)}) == 1

    def run(self, rank: int) -> slice:
        """What ``rank`` owns of it."""
        return slice(self.cuts[rank], self.cuts[rank + 1])


@dataclass(frozen=True)
class Layout:
    """Where each parameter begins, in the order in which they were given; the buckets, in the order of the buffer."""

    starts: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.buckets[-1].last

    def owned(self, rank: int) -> int:
        """Elements that ``rank`` owns, padding included."""
        return sum(bucket.cuts[rank + 1] - bucket.cuts[rank] for bucket in self.buckets)


def lay_out(sizes: Sequence[int], shards: int, limit: int, whole: bool = False) -> Layout:
    """The layout of parameters of ``sizes`` elements for ``shards`` ranks, in buckets of at most ``limit`` elements, by
    parameter where ``whole``. A bucket holds at least one cache line of each rank, or one parameter, whatever the
    limit."""
    return _by_parameter(sizes, shards, limit) if whole else _by_element(sizes, shards, limit)


def bucket_size(zero: HybridZeroConfig) -> int:
    """Elements of a bucket, at most: what is reduced and what is gathered at once are the same."""
    sizes = (zero.reduce_bucket_size, zero.all_gather_size)
    return min((size for size in sizes if size is not None), default=2**29)


def padded(numel: int, shards: int) -> int:
    """``numel`` rounded up so that all ``shards`` are equal and aligned."""
    unit = shards * ALIGNMENT
    return -(-numel // unit) * unit


def _by_element(sizes: Sequence[int], shards: int, limit: int) -> Layout:
    """One after another without gaps; buckets are as equal as can be."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    unit = shards * ALIGNMENT
    units = max(padded(starts.pop(), shards) // unit, 1)
    count = -(-units // max(limit // unit, 1))
    ends = [units * number // count * unit for number in range(count + 1)]
    buckets = (Bucket(tuple(range(first, last + 1, (last - first) // shards))) for first, last in pairwise(ends))
    return Layout(tuple(starts), tuple(buckets))


def _by_parameter(sizes: Sequence[int], shards: int, limit: int) -> Layout:
    """Each to the rank that has least so far, the largest of a bucket first."""
    starts, buckets, loads, end = [0] * len(sizes), [], [0] * shards, 0
    for numbers in _filled(sizes, limit):
        owners: list[list[int]] = [[] for _ in range(shards)]
        for number in sorted(numbers, key=lambda each: -sizes[each]):
            rank = loads.index(min(loads))
            owners[rank].append(number)
            loads[rank] += sizes[number]
        cuts = [end]
        for owned in owners:
            for number in sorted(owned):
                starts[number], end = end, end + sizes[number]
            end = padded(end, 1)
            cuts.append(end)
        buckets.append(Bucket(tuple(cuts)))
    return Layout(tuple(starts), tuple(buckets))


def _filled(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbours together, as many as the limit allows."""
    filled: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not filled or size > room:
            filled.append([])
            room = limit
        filled[-1].append(number)
        room -= size
    return filled
