"""How the parameters of a flat buffer lie in it, and who owns which part: pure arithmetic.

A buffer is cut into buckets, each reduced and gathered at once. A bucket is cut into runs, of which rank r of the zero
group owns run r. For two ranks (``|`` parts the runs, ``‖`` the buckets, ``·`` is padding)::

    by element      w0 w0 w0 w1 | w1 w1 w1 w2 ‖ w2 w3 w3 w3 | w3 w3 ·  ·     runs of a bucket are equally long
    by parameter    w0 w0 w0 | w1 w1 w1 w1 ‖ w3 w3 w3 w3 w3 | w2 w2          every parameter is one rank's

By element nothing is wasted, and one collective serves a bucket. By parameter an owner has whole matrices, as some
optimizers need; runs are as long as the parameters happen to be.

Flat buffers: the parameters of one kind side by side, their gradients likewise, and what this rank owns of both.

Layout of a group of one bucket, for zero size 2 (``|`` parts the runs, ``·`` is padding)::

    values   [ w0 w0 w0 w0 w1 w1 | w1 w1 w2 ·  ·  ·  ]     the parameters are views of it
    grads    [ the same              |               ]     each ``main_grad`` is a view of it

Main parameters are the values themselves where their type is wide enough, else a float32 copy; reduced gradients
likewise. A shard has a part in each bucket.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from internlm.config.schema import HybridZeroConfig
from internlm.core.parallel.param_state import attach_main_grad
from internlm.core.parallel.placement import ParamPlacement
from internlm.solver.optimizer.param_groups import NamedParameter, ParamGroup, ParamGroupKey, ShardSlice
from internlm.utils.dtype import wide
from internlm.utils.torch_private import foreach_copy_

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


@dataclass(frozen=True)
class BucketEntry:
    """One parameter of a group, and where it lies in the flat buffers."""

    name: str
    parameter: nn.Parameter
    placement: ParamPlacement
    place: int  # in the model
    start: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.parameter.numel()


class FlatParamGroup(ParamGroup):
    """Parameters of one kind in flat buffers that ``shards`` ranks share, in buckets of at most ``bucket_size``
    elements. ``split_evenly`` shares buckets by element, where the kind allows it, rather than by parameter;
    ``wide_grads`` accumulates gradients in float32 at least, rather than in the parameters' type."""

    def __init__(
        self,
        kind: ParamGroupKey,
        parameters: Sequence[NamedParameter],
        shard: int = 0,
        shards: int = 1,
        *,
        bucket_size: int = 2**29,
        split_evenly: bool = True,
        wide_grads: bool = True,
    ) -> None:
        self.kind, self.rank = kind, shard
        whole = kind.needs_matrices or not split_evenly
        sizes = [each.parameter.numel() for each in parameters]
        self.layout = lay_out(sizes, shards, bucket_size, whole)
        self.members = [
            BucketEntry(*placed, start) for placed, start in zip(parameters, self.layout.starts, strict=True)
        ]
        self._in_order = sorted(self.members, key=lambda member: (member.start, member.stop))
        device = parameters[0].parameter.device
        self.values = torch.zeros(self.layout.numel, dtype=kind.dtype, device=device)
        grad_dtype = wide(kind.dtype) if wide_grads else kind.dtype
        self.grads = torch.zeros(self.layout.numel, dtype=grad_dtype, device=device)
        self._adopt()
        self.main_parts = self.parts_of(self.values)
        if self.has_main:
            self.main_parts = self.split(self.new_state())
        self.grad_parts = self.parts_of(self.grads)
        if grad_dtype != self.main_dtype:
            self.grad_parts = self.split(self.new_state())
        self.copy_params_to_main()

    @torch.no_grad()
    def _adopt(self) -> None:
        """Move every member into the flat buffers; from here on it is a view of them."""
        for member in self.members:
            parameter, where = member.parameter, slice(member.start, member.stop)
            view = self.values[where].view_as(parameter)
            view.copy_(parameter)
            parameter.data = view
            attach_main_grad(parameter, self.grads[where].view_as(parameter))

    # -- buckets and this rank's parts of them ------------------------------------------------------------------------
    @property
    def buckets(self) -> Sequence[Bucket]:
        """In the order of the buffer."""
        return self.layout.buckets

    def parts_of(self, flat: Tensor) -> list[Tensor]:
        """This rank's part of each bucket, as views of a whole buffer."""
        return [flat[bucket.run(self.rank)] for bucket in self.buckets]

    def _first(self) -> tuple[str, Tensor, Tensor]:
        first = self.members[0]
        return first.name, first.parameter, self.values[first.start :]

    # -- between types ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def copy_main_to_params(self) -> None:
        """Round the wider main parameters into this rank's shard of the values; nothing where they are the same
        memory."""
        if self.has_main:
            foreach_copy_(self.parts_of(self.values), self.main_parts)

    @torch.no_grad()
    def copy_params_to_main(self) -> None:
        """Widen this rank's shard of the values into the main parameters, after values were set."""
        if self.has_main:
            foreach_copy_(self.main_parts, self.parts_of(self.values))

    # -- parameters ---------------------------------------------------------------------------------------------------
    def members_of(self, number: int) -> list[BucketEntry]:
        """The parameters of which a part lies in that bucket."""
        return self._between(self.buckets[number].first, self.buckets[number].last)

    def pieces(self) -> Iterator[ShardSlice]:
        """Which parts of which parameters the shard holds, in its order."""
        for number in range(len(self.buckets)):
            for member, lo, hi in self._held(number):
                start = member.start - self.buckets[number].run(self.rank).start
                yield ShardSlice(member.name, member.placement, lo - start, hi - start, number, lo, hi)

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """As views of the buffer."""
        for member in self.members:
            yield member.place, member.name, self.grads[member.start : member.stop]

    def _held(self, number: int) -> Iterator[tuple[BucketEntry, int, int]]:
        """The parameters in this rank's part of a bucket, and which elements of the part each is."""
        run = self.buckets[number].run(self.rank)
        for member in self._between(run.start, run.stop):
            lo, hi = max(member.start, run.start), min(member.stop, run.stop)
            if lo < hi:
                yield member, lo - run.start, hi - run.start

    def _between(self, first: int, last: int) -> list[BucketEntry]:
        """The parameters of which a part lies in [first, last)."""
        begin = bisect_right(self._in_order, first, key=lambda member: member.stop)
        end = bisect_left(self._in_order, last, key=lambda member: member.start)
        return self._in_order[begin:end]
