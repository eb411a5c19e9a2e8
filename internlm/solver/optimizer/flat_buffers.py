"""Flat buffers: contiguous parameters and contiguous gradients of a param group, sharded over the zero group.

A buffer is divided into buckets, each reduced and gathered as a unit. Each rank of the zero group owns a shard of every
bucket. With two ranks (``|`` separates shards, ``‖`` separates buckets, ``·`` is padding)::

    by element      w0 w0 w0 w1 | w1 w1 w1 w2 ‖ w2 w3 w3 w3 | w3 w3 ·  ·     shards of a bucket have the same length
    by parameter    w0 w0 w0 | w1 w1 w1 w1 ‖ w3 w3 w3 w3 w3 | w2 w2          every parameter is in one rank's shard

Sharding by element needs hardly any padding, and one collective per bucket. Sharding by parameter keeps each matrix
whole on one rank, as Muon requires, but the shards of a bucket differ in length.

The model's parameters become views of one flat buffer, ``values``, and their accumulated gradients become views of
another, ``grads``. If the dtype of ``values`` is at least float32, a rank's main parameters are its shard of
``values``, otherwise a float32 copy of that shard. Likewise, its reduced gradients are stored in its shard of ``grads``
or in a float32 copy of that shard.
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
from internlm.core.parallel.param_state import NamedParameter, attach_main_grad, complete_main_grad, mark_stale
from internlm.solver.optimizer.param_groups import ALONE, ParamGroup, ParamGroupKey, ShardSlice
from internlm.utils.dtype import wide
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.torch_private import foreach_copy_, foreach_zero_

ALIGNMENT = 64  # elements, so that a shard of any dtype starts on a cache line

# Elements. Without overlap, small buckets gain nothing, and each costs the latency of a collective.
_DEFAULT_BUCKET_SIZE = 2**29
#: Most shards of all buckets together; more take minutes and gigabytes to list.
MOST_SHARDS = 10**7


# -- layout: pure arithmetic ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bucket:
    """Bucket of a flat buffer, given by the bounds of its shards.

    Rank r of the zero group owns elements [``bounds[r]``, ``bounds[r + 1]``) of the buffer.
    """

    bounds: tuple[int, ...]

    @property
    def start(self) -> int:
        """Offset of the bucket's first element in the buffer."""
        return self.bounds[0]

    @property
    def stop(self) -> int:
        """Offset one past the bucket's last element in the buffer."""
        return self.bounds[-1]

    @property
    def is_even(self) -> bool:
        """Whether the shards of all ranks have the same length."""
        return len({stop - start for start, stop in pairwise(self.bounds)}) == 1

    def shard(self, rank: int) -> slice:
        """Return the range of the buffer that ``rank`` owns in this bucket."""
        return slice(self.bounds[rank], self.bounds[rank + 1])


@dataclass(frozen=True)
class Layout:
    """Layout of a flat buffer: the offset of each parameter, in the given order, and the buckets, in buffer order."""

    starts: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @property
    def numel(self) -> int:
        """Number of elements in the buffer, padding included."""
        return self.buckets[-1].stop

    def owned(self, rank: int) -> int:
        """Return the number of elements in the buffer that ``rank`` owns, padding included."""
        return sum(bucket.bounds[rank + 1] - bucket.bounds[rank] for bucket in self.buckets)


def lay_out(sizes: Sequence[int], ranks: int, limit: int, by_parameter: bool = False) -> Layout:
    """Compute the layout of a flat buffer whose buckets are sharded over the zero group.

    Args:
        sizes: Number of elements of each parameter.
        ranks: Size of the zero group.
        limit: Maximum number of elements in a bucket, padding excluded. A bucket is larger only if it would otherwise
            have fewer than :data:`ALIGNMENT` elements per rank or, with ``by_parameter``, split a parameter.
        by_parameter: Keep every parameter whole in one rank's shard, instead of sharding buckets evenly by element.

    Raises:
        ConfigError: The buckets are far too small for the model.
    """
    return _by_parameter(sizes, ranks, limit) if by_parameter else _by_element(sizes, ranks, limit)


def bucket_size(zero: HybridZeroConfig) -> int:
    """Return the maximum number of elements in a bucket: the smaller of ``reduce_bucket_size`` and ``all_gather_size``.

    The same buckets are used to reduce gradients and to gather parameters. A setting of None is ignored.
    """
    sizes = (zero.reduce_bucket_size, zero.all_gather_size)
    return min((size for size in sizes if size is not None), default=_DEFAULT_BUCKET_SIZE)


def padded(numel: int, ranks: int) -> int:
    """Round ``numel`` up, so that each of ``ranks`` equal shards has a multiple of :data:`ALIGNMENT` elements."""
    unit = ranks * ALIGNMENT
    return -(-numel // unit) * unit


def _by_element(sizes: Sequence[int], ranks: int, limit: int) -> Layout:
    """Place parameters without gaps in buckets whose sizes differ by at most ``ranks`` · :data:`ALIGNMENT` elements."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    # Buckets of equal size rather than full ones and a remainder, so that all take equally long to reduce.
    unit = ranks * ALIGNMENT
    units = max(padded(starts.pop(), ranks) // unit, 1)
    count = -(-units // max(limit // unit, 1))
    if count * ranks > MOST_SHARDS:
        message = f"{limit} splits {sum(sizes)} elements into {count} buckets"
        todo = "Use larger buckets, or a smaller model"
        raise ConfigError(Problem("hybrid_zero_optimizer.reduce_bucket_size", message, todo))
    ends = [units * index // count * unit for index in range(count + 1)]
    buckets = (Bucket(tuple(range(start, stop + 1, (stop - start) // ranks))) for start, stop in pairwise(ends))
    return Layout(tuple(starts), tuple(buckets))


def _by_parameter(sizes: Sequence[int], ranks: int, limit: int) -> Layout:
    """Assign the parameters of each bucket, largest first, to the rank that owns the fewest elements so far.

    This is longest-processing-time scheduling: no rank owns more than an equal share plus one parameter (Graham 1969).
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
    """Group consecutive parameters into buckets of at most ``limit`` elements; return the indices in each bucket.

    A parameter of more than ``limit`` elements gets a bucket of its own.
    """
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
    """Entry of a bucket: a parameter and its offset in the flat buffers of its group."""

    named: NamedParameter
    start: int

    @property
    def stop(self) -> int:
        """Offset one past the parameter's last element."""
        return self.start + self.named.parameter.numel()


class FlatParamGroup(ParamGroup):
    """Param group stored in flat buffers; each rank of the zero group owns a shard of them."""

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
        self._stale: set[Tensor] = set()
        self._padding = [self.grads[gap] for gap in self._gaps()]
        self._move_into_buffers()
        self.main_shards = self.shards_of(self.values)
        if self.has_main:
            self.main_shards = self.split(self.new_state())
        self.grad_shards = self.shards_of(self.grads)
        if grad_dtype != self.main_dtype:
            # Gradients are accumulated in half precision, but the all-reduce over replicas and the update use float32.
            self.grad_shards = self.split(self.new_state())
        self.copy_model_to_main_params()

    @torch.no_grad()
    def _move_into_buffers(self) -> None:
        """Copy each parameter into the flat buffer ``values``, and make the parameter a view of that buffer."""
        for entry in self.entries:
            parameter, where = entry.named.parameter, slice(entry.start, entry.stop)
            view = self.values[where].view_as(parameter)
            view.copy_(parameter)
            # Assigning .data keeps the Parameter object, to which modules, tied weights and users' own lists refer.
            parameter.data = view

    def attach_grads(self) -> None:
        """Attach ``grads`` to the parameters, as the memory in which backward passes accumulate gradients."""
        for entry in self.entries:
            parameter = entry.named.parameter
            attach_main_grad(parameter, self.grads[entry.start : entry.stop].view_as(parameter))

    def _begin_grads(self) -> None:
        # The first gradient of each parameter overwrites that of the last step. No gradient overwrites the padding, but
        # dividing by a norm of NaN may have.
        self._stale = mark_stale(entry.named.parameter for entry in self.entries)
        if self._padding:
            foreach_zero_(self._padding)

    def complete_grads(self, index: int | None = None) -> None:
        """Set the gradients to zero that got none in this step, of the parameters in bucket ``index`` or of all."""
        if self._stale:  # hardly ever
            for entry in self.entries if index is None else self.entries_of(index):
                complete_main_grad(entry.named.parameter)

    def _gaps(self) -> Iterator[slice]:
        """Yield the ranges of the flat buffers that belong to no parameter."""
        end = 0
        for entry in self._in_buffer_order:
            if end < entry.start:
                yield slice(end, entry.start)
            end = max(end, entry.stop)
        if end < self.layout.numel:
            yield slice(end, self.layout.numel)

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Buckets in buffer order."""
        return self.layout.buckets

    def shards_of(self, flat: Tensor) -> list[Tensor]:
        """Return a view of this rank's shard of each bucket of ``flat``, which is ``values`` or ``grads``."""
        return [flat[bucket.shard(self.rank)] for bucket in self.buckets]

    def _first_parameter(self) -> tuple[str, Tensor, Tensor]:
        first = self.entries[0]
        return first.named.name, first.named.parameter, self.values[first.start :]

    @torch.no_grad()
    def copy_main_to_model_params(self) -> None:
        """Copy main parameters, rounded, to this rank's shard of the model parameters; no-op if they share memory."""
        if self.has_main:
            foreach_copy_(self.shards_of(self.values), self.main_shards)

    @torch.no_grad()
    def copy_model_to_main_params(self) -> None:
        """Copy this rank's shard of the model parameters to the main parameters; no-op if they share memory."""
        if self.has_main:
            foreach_copy_(self.main_shards, self.shards_of(self.values))

    def entries_of(self, index: int) -> list[BucketEntry]:
        """Return the entries of all parameters that have elements in bucket ``index``."""
        return self._entries_between(self.buckets[index].start, self.buckets[index].stop)

    def shard_slices(self) -> Iterator[ShardSlice]:
        """Iterate over the parameter slices in this rank's shard, in the order of the shard."""
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
        """Yield (model position, name, local gradient) for each parameter; the gradients are views of ``grads``."""
        for entry in self.entries:
            yield entry.named.position, entry.named.name, self.grads[entry.start : entry.stop]

    def _entries_between(self, start: int, stop: int) -> list[BucketEntry]:
        """Return the entries of all parameters that have elements in [``start``, ``stop``)."""
        # Bisection, because checkpoints and Muon look up every bucket, and models have thousands of parameters.
        begin = bisect_right(self._in_buffer_order, start, key=lambda entry: entry.stop)
        end = bisect_left(self._in_buffer_order, stop, key=lambda entry: entry.start)
        return self._in_buffer_order[begin:end]


class FullyShardedParamGroup(ParamGroup):
    """Param group of parameters that ``fully_shard`` has sharded (:mod:`internlm.core.parallel.fully_sharded`).

    The parameter rows that a rank holds are its shard of the group and also its main parameters: ``fully_shard`` rounds
    them to the compute dtype in its all-gather. ``fully_shard`` also reduces the gradients inside the zero group, into
    one flat buffer. A shard has one tensor for each parameter.
    """

    def __init__(self, key: ParamGroupKey, parameters: Sequence[NamedParameter]) -> None:
        self.key, self.parameters = key, parameters
        self._local = [local_shard(named.parameter) for named in parameters]
        self.main_shards = [shard.flat for shard in self._local]
        self.grads = self.new_state()
        self.grad_shards = self.split(self.grads)

    def attach_grads(self) -> None:
        """Attach ``grads`` to the parameters, as the memory in which backward passes accumulate gradients."""
        for named, grad in zip(self.parameters, self.grad_shards, strict=True):
            set_grad(named.parameter, grad)

    def _first_parameter(self) -> tuple[str, Tensor, Tensor]:
        return self.parameters[0].name, self.parameters[0].parameter, self.main_shards[0]

    def shard_slices(self) -> Iterator[ShardSlice]:
        """Iterate over the parameter slices in this rank's shard: one per parameter, possibly empty."""
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
        """Yield (model position, name, gradient of this rank's shard) for each parameter."""
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
        """Bounds of this bucket in the group's flat buffers."""
        return self.group.buckets[self.index]

    @property
    def entries(self) -> list[BucketEntry]:
        """Bucket entries of all parameters that have elements in this bucket."""
        return self.group.entries_of(self.index)


def buckets_in_forward_order(groups: Sequence[FlatParamGroup]) -> list[GroupBucket]:
    """Return the buckets of all groups, sorted by the model position of their first parameter.

    The list is the same on all ranks of the zero group, so collectives launched in its order match.
    """
    buckets = [GroupBucket(group, index) for group in groups for index in range(len(group.buckets))]
    return sorted(buckets, key=lambda bucket: min((entry.named.position for entry in bucket.entries), default=0))
