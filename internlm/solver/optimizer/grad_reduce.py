"""Reduction of gradients: each rank gets the summed gradients of the elements that it owns.

A bucket is reduced over up to three process groups, one after the other:

1. *zero group*: a reduce-scatter, or one reduce per shard if the shards differ in length. Each rank gets the sum of the
   gradients of its shard.
2. *replicas* of the shard: an all-reduce.
3. ranks with *partial sums* (``partial_over`` of the placement, for example norms under msp): an all-reduce.

Buckets are reduced from the last layer to the first, as a backward pass completes them, in the same order on every
rank. With overlap, the reduction of a bucket over the zero group is launched in the backward pass of the last
micro-batch, once the gradients of this bucket and of all earlier buckets are ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from internlm.core.parallel.collectives import Pending, begin_all_reduce, begin_reduce, begin_reduce_scatter
from internlm.solver.optimizer.flat_buffers import (
    BucketEntry,
    FlatParamGroup,
    FullyShardedParamGroup,
    GroupBucket,
    buckets_in_forward_order,
)
from internlm.solver.optimizer.param_groups import ProcessGroups
from internlm.utils.errors import Problem, UserError
from internlm.utils.same_memory import same_memory


class GradReadyTracker:
    """Tracker that calls ``on_bucket_ready(index)`` for each bucket in order, once its gradients are complete.

    The number of accumulations into a parameter's gradient in a step depends only on the model and on the number of
    micro-batches (tied weights, recompute and deferred gradients included). The first step with a given number of
    micro-batches counts the accumulations; in later steps a parameter is ready when its count is reached. If a
    parameter gets no gradient, its bucket and the buckets after it are reduced at the end of the step.
    """

    def __init__(self, buckets: Sequence[Sequence[BucketEntry]], on_bucket_ready: Callable[[int], None]) -> None:
        self.buckets, self.on_bucket_ready = buckets, on_bucket_ready
        self._counts: dict[nn.Parameter, int] = {}
        self._buckets_of: dict[nn.Parameter, list[int]] = {}
        for index, entries in enumerate(buckets):
            for entry in entries:
                self._buckets_of.setdefault(entry.named.parameter, []).append(index)
                entry.named.state.on_grad_ready = partial(self._count, entry)
        self._learned: dict[int, dict[nn.Parameter, int]] = {}  # counts by number of micro-batches
        self._expected: dict[nn.Parameter, int] = {}
        self._micro_batches: int | None = None
        self._missing: list[int] = []  # number of parameters that are not ready, by bucket
        self._next = 0  # index of the first bucket whose reduction is not launched

    def begin_step(self, micro_batches: int | None) -> None:
        """Start counting the gradient accumulations of a step.

        Args:
            micro_batches: Number of micro-batches. None if unknown: no bucket is then ready before the end of the step,
                and the counts of the step are not stored.
        """
        self._counts = dict.fromkeys(self._buckets_of, 0)
        self._micro_batches = micro_batches
        self._expected = self._learned.get(micro_batches, {}) if micro_batches else {}
        self._missing = [len(entries) for entries in self.buckets]
        self._next = 0

    def end_step(self) -> None:
        """Store the accumulation counts of the step.

        Until the next step, accumulating a gradient raises an error, because the buckets are being reduced.
        """
        if self._micro_batches:
            self._learned.setdefault(self._micro_batches, self._counts)
        self.begin_step(None)
        self._next = len(self.buckets)

    def _count(self, entry: BucketEntry) -> None:
        parameter = entry.named.parameter
        self._counts[parameter] = count = self._counts.get(parameter, 0) + 1
        expected = self._expected.get(parameter, 0)
        if count == expected:
            for index in self._buckets_of[parameter]:
                self._missing[index] -= 1
            # Strictly in order, even if a later bucket is complete first: all ranks of a group must launch collectives
            # in the same order, but their backward passes may differ.
            while self._next < len(self.buckets) and not self._missing[self._next]:
                self._next += 1
                self.on_bucket_ready(self._next - 1)
        elif count > expected and min(self._buckets_of[parameter]) < self._next:
            message = (
                f"a gradient of {entry.named.name!r} was accumulated after the reduction of its bucket had begun: "
                "expected as many gradients as in the first step, all before optimizer.begin_reduction()"
            )
            todo = "Call optimizer.begin_reduction() only after the last backward pass, or set overlap_sync_grad=False"
            raise UserError(Problem("hybrid_zero_optimizer.overlap_sync_grad", message, todo))


class BucketReduction:
    """Reduction of one bucket over up to three process groups; this rank gets the summed gradients of its shard."""

    def __init__(self, bucket: GroupBucket, process_groups: ProcessGroups, dtype: torch.dtype | None) -> None:
        """Launch the reduction over the zero group.

        Args:
            bucket: Bucket whose gradients are complete.
            process_groups: Process groups to reduce over.
            dtype: Dtype in which gradients are sent. None: the dtype in which they are accumulated.
        """
        group, bounds = bucket.group, bucket.bucket.bounds
        self.group, self.process_groups = group, process_groups
        self._shard = group.grad_shards[bucket.index]
        self._pending: list[Pending] = []
        whole = group.grads[bounds[0] : bounds[-1]]
        sent = whole.to(dtype or whole.dtype)  # no copy if the dtypes are equal
        # Only the slices that are used: a group of a thousand ranks has as many.
        shards = [slice(start - bounds[0], stop - bounds[0]) for start, stop in pairwise(bounds)]
        self._sent_shard = sent[shards[group.rank]]
        if bucket.bucket.is_even:
            self._pending = [begin_reduce_scatter(sent, process_groups.zero, self._sent_shard)]
        else:
            owned = [(rank, shard) for rank, shard in enumerate(shards) if shard.stop > shard.start]
            self._pending = [begin_reduce(sent[shard], process_groups.zero, rank) for rank, shard in owned]

    def release_if_completed(self) -> None:
        """Free the temporary buffers of collectives that have completed."""
        for pending in self._pending:
            pending.release_if_completed()

    def begin_replicas(self) -> None:
        """Wait for the reduction over the zero group, then launch the all-reduce over the replicas of the shard."""
        self.finish()
        if self._sent_shard.numel():
            self._pending = [begin_all_reduce(self._sent_shard, self.process_groups.replica)]

    def begin_partial(self) -> None:
        """Wait for the all-reduce over replicas, then launch the all-reduce over ranks with partial sums, if any.

        In between, the result of the first all-reduce is copied to the ``grad_shards`` of the group.
        """
        self.finish()
        if not same_memory(self._sent_shard, self._shard):
            self._shard.copy_(self._sent_shard)
        mode = self.group.key.partial_over
        if mode is not None and self._shard.numel():
            self._pending = [begin_all_reduce(self._shard, self.process_groups.of_partial(mode))]

    def finish(self) -> None:
        """Block until all launched collectives have completed."""
        for pending in self._pending:
            pending.wait()
        self._pending = []


class GradReducer:
    """Reducer of the gradients in flat buffers, bucket by bucket.

    Args:
        groups: Param groups of this rank.
        process_groups: Process groups to reduce over.
        dtype: Dtype in which gradients are sent. None: the dtype in which they are accumulated.
        overlap: Reduce buckets during the backward pass.
    """

    def __init__(
        self,
        groups: Sequence[FlatParamGroup],
        process_groups: ProcessGroups,
        dtype: torch.dtype | None,
        overlap: bool,
    ) -> None:
        self.process_groups, self.dtype = process_groups, dtype
        self.buckets = buckets_in_forward_order(groups)[::-1]
        self.begun: list[BucketReduction] = []
        self._tracker = GradReadyTracker([bucket.entries for bucket in self.buckets], self._begin) if overlap else None

    def begin_step(self, micro_batches: int | None) -> None:
        """Prepare the reduction of the gradients of a step.

        Args:
            micro_batches: Number of micro-batches. None if unknown: buckets are then reduced after the backward passes.
        """
        # Reductions of a step that raised may still read and write the buffers.
        for reduction in self.begun:
            reduction.finish()
        self.begun = []
        if self._tracker:
            self._tracker.begin_step(micro_batches)

    def begin(self) -> None:
        """Launch the bucket reductions that have not been launched yet; all gradients must be complete."""
        if self._tracker:
            self._tracker.end_step()
        for index in range(len(self.begun), len(self.buckets)):
            self._begin(index)

    def reduce(self) -> None:
        """Reduce all gradients, which must be complete, into the ``grad_shards`` of their groups."""
        self.begin()
        # Over all buckets before the next process group, so that the collectives of one group overlap one another.
        for advance in (BucketReduction.begin_replicas, BucketReduction.begin_partial, BucketReduction.finish):
            for reduction in self.begun:
                advance(reduction)
        self.begin_step(None)

    def _begin(self, index: int) -> None:
        for reduction in self.begun:
            reduction.release_if_completed()
        bucket = self.buckets[index]
        bucket.group.complete_grads(bucket.index)
        self.begun.append(BucketReduction(bucket, self.process_groups, self.dtype))


class FullyShardedReducer:
    """Reducer of the gradients of fully sharded parameters, over replicas and over ranks with partial sums.

    ``fully_shard`` has already reduced these gradients inside the zero group.

    Args:
        groups: Param groups of this rank.
        process_groups: Process groups to reduce over.
        dtype: Dtype in which replicas send gradients. None: the dtype in which gradients are accumulated.
    """

    def __init__(
        self, groups: Sequence[FullyShardedParamGroup], process_groups: ProcessGroups, dtype: torch.dtype | None
    ) -> None:
        # The last ranks may hold no rows of a group's parameters. Nor do their replicas, so the all-reduce calls match.
        self.groups = [group for group in groups if group.owned]
        self.process_groups, self.dtype = process_groups, dtype

    def begin_step(self, micro_batches: int | None) -> None:
        """Do nothing: no reduction is launched before all gradients are complete."""

    def begin(self) -> None:
        """Do nothing: the all-reduce over replicas is short compared with the step, so it is not overlapped."""

    def reduce(self) -> None:
        """Reduce all gradients in place, first over replicas, then over ranks with partial sums."""
        if self.process_groups.replica.size > 1:
            sent = [group.grads.to(self.dtype or group.grads.dtype) for group in self.groups]
            pending = [begin_all_reduce(grads, self.process_groups.replica) for grads in sent]
            for group, summed in zip(self.groups, pending, strict=True):
                group.grads.copy_(summed.wait())
        partial_sums = [
            begin_all_reduce(group.grads, self.process_groups.of_partial(group.key.partial_over))
            for group in self.groups
            if group.key.partial_over is not None
        ]
        for summed in partial_sums:
            summed.wait()
