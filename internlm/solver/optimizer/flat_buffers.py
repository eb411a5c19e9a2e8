"""Flat buffers: the parameters of a group side by side, their gradients likewise, and the shard that this rank owns.

A buffer is divided into buckets, each reduced and gathered by one operation. Each rank of the zero group owns a shard
of every bucket. With two ranks (``|`` separates shards, ``‖`` buckets, ``·`` is padding)::

    by element      w0 w0 w0 w1 | w1 w1 w1 w2 ‖ w2 w3 w3 w3 | w3 w3 ·  ·     shards of a bucket are equally long
    by parameter    w0 w0 w0 | w1 w1 w1 w1 ‖ w3 w3 w3 w3 w3 | w2 w2          every parameter is in one rank's shard

By element, no memory is wasted and one collective serves a bucket. By parameter, an owner has whole matrices, as Muon
needs, and shards differ in length.

The model's parameters become views of ``values``, their main gradients views of ``grads``. Main parameters are the
values themselves where their dtype is wide enough, else a float32 copy of the shard; reduced gradients likewise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from internlm.config.schema import HybridZeroConfig
from internlm.core.context.group import Group
from internlm.core.parallel.fully_sharded import local_shard, set_grad
from internlm.core.parallel.param_state import NamedParameter, attach_main_grad
from internlm.solver.optimizer.param_groups import ALONE, ParamGroup, ParamGroupKey, ShardSlice
from internlm.utils.dtype import wide
from internlm.utils.torch_private import foreach_copy_

ALIGNMENT = 64  # elements: a shard starts on a cache line whatever its dtype

# Elements. Without overlap, small buckets gain nothing, and each costs the latency of a collective.
_DEFAULT_BUCKET_SIZE = 2**29


# -- layout: pure arithmetic ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bucket:
    """Bucket of a flat buffer, given by the bounds of the ranks' shards."""

    bounds: tuple[int, ...]

    @property
    def start(self) -> int:
        """Offset of the first element in the buffer."""
        return self.bounds[0]

    @property
    def stop(self) -> int:
        """Offset one past the last element in the buffer."""
        return self.bounds[-1]

    @property
    def is_even(self) -> bool:
        """Whether the shards of all ranks are equally long."""
        return len({stop - start for start, stop in pairwise(self.bounds)}) == 1

    def shard(self, rank: int) -> slice:
        """Return the range of the buffer that ``rank`` owns in this bucket."""
        return slice(self.bounds[rank], self.bounds[rank + 1])


@dataclass(frozen=True)
class Layout:
    """Offset of each parameter, in the order of the arguments, and the buckets in buffer order."""

    starts: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the buffer, padding included."""
        return self.buckets[-1].stop

    def owned(self, rank: int) -> int:
        """Return the number of elements that ``rank`` owns, padding included."""
        return sum(bucket.bounds[rank + 1] - bucket.bounds[rank] for bucket in self.buckets)


def lay_out(sizes: Sequence[int], ranks: int, limit: int, by_parameter: bool = False) -> Layout:
    """Lay out parameters in buckets that ``ranks`` ranks share.

    Args:
        sizes: Elements of each parameter.
        ranks: Size of the zero group.
        limit: Maximum number of elements of a bucket, exceeded only if one cache line per rank, or one parameter, is
            larger.
        by_parameter: Keep every parameter whole in one rank's shard, instead of sharing buckets evenly by element.
    """
    return _by_parameter(sizes, ranks, limit) if by_parameter else _by_element(sizes, ranks, limit)


def bucket_size(zero: HybridZeroConfig) -> int:
    """Return the maximum number of elements of a bucket.

    Gradients are reduced and parameters gathered by the same buckets, so the smaller of the two settings counts.
    """
    sizes = (zero.reduce_bucket_size, zero.all_gather_size)
    return min((size for size in sizes if size is not None), default=_DEFAULT_BUCKET_SIZE)


def padded(numel: int, ranks: int) -> int:
    """Round ``numel`` up so that the shards of all ranks are equal and aligned."""
    unit = ranks * ALIGNMENT
    return -(-numel // unit) * unit


def _by_element(sizes: Sequence[int], ranks: int, limit: int) -> Layout:
    """Put one parameter after another without gaps, in buckets that differ by at most one aligned unit."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    # Equal buckets rather than full ones and a remainder, so that no bucket takes longer to reduce than another.
    unit = ranks * ALIGNMENT
    units = max(padded(starts.pop(), ranks) // unit, 1)
    count = -(-units // max(limit // unit, 1))
    ends = [units * index // count * unit for index in range(count + 1)]
    buckets = (Bucket(tuple(range(start, stop + 1, (stop - start) // ranks))) for start, stop in pairwise(ends))
    return Layout(tuple(starts), tuple(buckets))


def _by_parameter(sizes: Sequence[int], ranks: int, limit: int) -> Layout:
    """Assign each parameter to the rank that owns the least so far, the largest of a bucket first.

    This is longest-processing-time scheduling: no rank owns more than a fair share and one parameter (Graham 1969).
    """
    starts, buckets, loads, end = [0] * len(sizes), [], [0] * ranks, 0
    for bucket in _fill_buckets(sizes, limit):
        owned: list[list[int]] = [[] for _ in range(ranks)]
        for index in sorted(bucket, key=lambda index: -sizes[index]):
            rank = loads.index(min(loads))
            owned[rank].append(index)
            loads[rank] += sizes[index]
        bounds = [end]
        for indices in owned:
            for index in sorted(indices):
                starts[index], end = end, end + sizes[index]
            end = padded(end, 1)
            bounds.append(end)
        buckets.append(Bucket(tuple(bounds)))
    return Layout(tuple(starts), tuple(buckets))


def _fill_buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Fill buckets with neighbouring parameters up to the limit, and return the indices in each bucket."""
    buckets: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(index)
        room -= size
    return buckets


# -- groups in flat buffers -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BucketEntry:
    """A parameter and its offset in the flat buffers of its group."""

    named: NamedParameter
    start: int

    @property
    def stop(self) -> int:
        """Offset one past the parameter's last element."""
        return self.start + self.named.parameter.numel()


class FlatParamGroup(ParamGroup):
    """Parameters of one key in flat buffers that the ranks of the zero group share."""

    def __init__(
        self,
        key: ParamGroupKey,
        parameters: Sequence[NamedParameter],
        zero: Group = ALONE,
        config: HybridZeroConfig | None = None,
    ) -> None:
        config = config or HybridZeroConfig()
        self.key, self.rank = key, zero.rank
        by_parameter = key.needs_matrices or not config.use_split_tensor_optim
        sizes = [named.parameter.numel() for named in parameters]
        self.layout = lay_out(sizes, zero.size, bucket_size(config), by_parameter)
        self.entries = [BucketEntry(named, start) for named, start in zip(parameters, self.layout.starts, strict=True)]
        self._in_buffer_order = sorted(self.entries, key=lambda entry: (entry.start, entry.stop))
        device = parameters[0].parameter.device
        grad_dtype = wide(key.dtype) if config.fp32_grad_accum else key.dtype
        # Zeros, because padding takes part in collectives, the norm and the update like any other element.
        self.values = torch.zeros(self.layout.numel, dtype=key.dtype, device=device)
        self.grads = torch.zeros(self.layout.numel, dtype=grad_dtype, device=device)
        self._move_into_buffers()
        self.main_shards = self.shards_of(self.values)
        if self.has_main:
            self.main_shards = self.split(self.new_state())
        self.grad_shards = self.shards_of(self.grads)
        if grad_dtype != self.main_dtype:
            # Gradients are accumulated in half precision, but replicas sum them, and the update reads them, in float32.
            self.grad_shards = self.split(self.new_state())
        self.copy_model_to_main_params()

    @torch.no_grad()
    def _move_into_buffers(self) -> None:
        """Copy every parameter into the flat buffers and make it a view of them."""
        for entry in self.entries:
            parameter, where = entry.named.parameter, slice(entry.start, entry.stop)
            view = self.values[where].view_as(parameter)
            view.copy_(parameter)
            # Assigning .data keeps the Parameter object, to which modules, tied weights and users' own lists refer.
            parameter.data = view

    def attach_grads(self) -> None:
        """Accumulate gradients in ``grads`` from now on."""
        for entry in self.entries:
            parameter = entry.named.parameter
            attach_main_grad(parameter, self.grads[entry.start : entry.stop].view_as(parameter))

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Buckets in buffer order."""
        return self.layout.buckets

    def shards_of(self, flat: Tensor) -> list[Tensor]:
        """Return this rank's shard of each bucket as views of ``flat``, which is ``values`` or ``grads``."""
        return [flat[bucket.shard(self.rank)] for bucket in self.buckets]

    def _first_parameter(self) -> tuple[str, Tensor, Tensor]:
        first = self.entries[0]
        return first.named.name, first.named.parameter, self.values[first.start :]

    @torch.no_grad()
    def copy_main_to_model_params(self) -> None:
        """Round main parameters into this rank's shard of the model parameters; no-op if they share memory."""
        if self.has_main:
            foreach_copy_(self.shards_of(self.values), self.main_shards)

    @torch.no_grad()
    def copy_model_to_main_params(self) -> None:
        """Widen this rank's shard of the model parameters into the main parameters."""
        if self.has_main:
            foreach_copy_(self.main_shards, self.shards_of(self.values))

    def entries_of(self, index: int) -> list[BucketEntry]:
        """Return the entries of the parameters that lie in bucket ``index``, wholly or partly."""
        return self._entries_between(self.buckets[index].start, self.buckets[index].stop)

    def shard_slices(self) -> Iterator[ShardSlice]:
        """Iterate over the slices of parameters that the shard holds, in its order."""
        for index, bucket in enumerate(self.buckets):
            shard = bucket.shard(self.rank)
            for entry in self._entries_between(shard.start, shard.stop):
                lo, hi = max(entry.start, shard.start), min(entry.stop, shard.stop)
                if lo < hi:
                    yield ShardSlice(
                        name=entry.named.name,
                        placement=entry.named.placement,
                        start=lo - entry.start,
                        stop=hi - entry.start,
                        index=index,
                        lo=lo - shard.start,
                        hi=hi - shard.start,
                    )

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """Iterate over position, name and local gradient of each parameter, as views of the buffer."""
        for entry in self.entries:
            yield entry.named.position, entry.named.name, self.grads[entry.start : entry.stop]

    def _entries_between(self, start: int, stop: int) -> list[BucketEntry]:
        """Return the entries of the parameters with elements in [start, stop)."""
        # Bisection, because checkpoints and Muon look up every bucket, and models have thousands of parameters.
        begin = bisect_right(self._in_buffer_order, start, key=lambda entry: entry.stop)
        end = bisect_left(self._in_buffer_order, stop, key=lambda entry: entry.start)
        return self._in_buffer_order[begin:end]


class FullyShardedParamGroup(ParamGroup):
    """Parameters of one key that ``fully_shard`` has sharded (:mod:`internlm.core.parallel.fully_sharded`).

    A rank owns the rows that it holds, and these are the main parameters: they are rounded when they are gathered.
    ``fully_shard`` reduces gradients inside the zero group into one flat buffer. A shard has one tensor for each
    parameter.
    """

    def __init__(self, key: ParamGroupKey, parameters: Sequence[NamedParameter]) -> None:
        self.key, self.parameters = key, parameters
        self._local = [local_shard(named.parameter) for named in parameters]
        self.main_shards = [shard.flat for shard in self._local]
        self.grads = self.new_state()
        self.grad_shards = self.split(self.grads)

    def attach_grads(self) -> None:
        """Accumulate gradients in ``grads`` from now on."""
        for named, grad in zip(self.parameters, self.grad_shards, strict=True):
            set_grad(named.parameter, grad)

    def _first_parameter(self) -> tuple[str, Tensor, Tensor]:
        return self.parameters[0].name, self.parameters[0].parameter, self.main_shards[0]

    def shard_slices(self) -> Iterator[ShardSlice]:
        """Iterate over the slices of parameters that the shard holds: one per parameter, which may be empty."""
        for index, (named, (flat, start)) in enumerate(zip(self.parameters, self._local, strict=True)):
            yield ShardSlice(
                name=named.name,
                placement=named.placement,
                start=start,
                stop=start + len(flat),
                index=index,
                lo=0,
                hi=len(flat),
            )

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """Iterate over position, name and gradient of this rank's shard of each parameter."""
        for named, grad in zip(self.parameters, self.grad_shards, strict=True):
            yield named.position, named.name, grad


# -- buckets of all groups --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GroupBucket:
    """Bucket of a param group, given by its index in the group."""

    group: FlatParamGroup
    index: int

    @property
    def bucket(self) -> Bucket:
        """Offsets of the bucket in the group's flat buffers."""
        return self.group.buckets[self.index]

    @property
    def entries(self) -> list[BucketEntry]:
        """Bucket entries of the parameters that lie in this bucket, wholly or partly."""
        return self.group.entries_of(self.index)


def buckets_in_forward_order(groups: Sequence[FlatParamGroup]) -> list[GroupBucket]:
    """Sort the buckets of all groups by the position in the model of their first parameter.

    The list is the same on all ranks of the zero group, so collectives launched in its order match.
    """
    buckets = [GroupBucket(group, index) for group in groups for index in range(len(group.buckets))]
    return sorted(buckets, key=lambda bucket: min((entry.named.position for entry in bucket.entries), default=0))
