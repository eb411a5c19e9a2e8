"""When the gradients of a bucket are complete, found by counting.

How often a parameter is told of in a step, since its gradient has grown or autograd is done with it, depends on the
model and on the number of micro-batches alone. So the first step of a number of micro-batches teaches how often that
is, and in later ones a bucket is complete when it was as often.

The sums of gradients: within the zero group, across the replicas of each shard, and over ranks that have parts of
the sum besides.

The order of buckets is that in which a backward pass is likely to end them, and the same on every rank: from the last
layer to the first. With overlap a bucket is begun in the backward pass of the last micro-batch, once all its gradients,
and the buckets before it, are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from internlm.core.parallel.collectives import Pending, begin_all_reduce, begin_reduce, begin_reduce_scatter
from internlm.core.parallel.param_state import set_on_grad_ready
from internlm.solver.optimizer.flat_buffers import BucketEntry, FlatParamGroup
from internlm.solver.optimizer.param_gather import in_forward_order
from internlm.solver.optimizer.param_groups import ProcessGroups
from internlm.utils.errors import Problem, UserError


class GradReadyTracker:
    """Calls ``complete(number)`` for each of ``buckets``, one after the other, once it and those before it are
    complete.

    A bucket with a parameter that gets no gradient, and those after it, are left to the end of the step.
    """

    def __init__(self, buckets: Sequence[Sequence[BucketEntry]], complete: Callable[[int], None]) -> None:
        self.buckets, self.complete = buckets, complete
        self._counts: dict[nn.Parameter, int] = {}
        self._holding: dict[nn.Parameter, list[int]] = {}
        for number, members in enumerate(buckets):
            for member in members:
                self._holding.setdefault(member.parameter, []).append(number)
                set_on_grad_ready(member.parameter, partial(self._arrived, member))
        self._learned: dict[int, dict[nn.Parameter, int]] = {}
        self._expected: dict[nn.Parameter, int] = {}
        self._micro_batches: int | None = None
        self._missing: list[int] = []
        self._next = 0

    def begin_step(self, micro_batches: int | None) -> None:
        """Count anew; ``micro_batches`` will follow, or nobody knows how many."""
        self._counts = dict.fromkeys(self._holding, 0)
        self._micro_batches = micro_batches
        self._expected = self._learned.get(micro_batches, {}) if micro_batches else {}
        self._missing = [len(members) for members in self.buckets]
        self._next = 0

    def end_step(self) -> None:
        """All gradients are there: learn. What comes now comes too late."""
        if self._micro_batches:
            self._learned.setdefault(self._micro_batches, self._counts)
        self.begin_step(None)
        self._next = len(self.buckets)

    def _arrived(self, member: BucketEntry) -> None:
        parameter = member.parameter
        self._counts[parameter] = count = self._counts.get(parameter, 0) + 1
        expected = self._expected.get(parameter, 0)
        if count == expected:
            for number in self._holding[parameter]:
                self._missing[number] -= 1
            while self._next < len(self.buckets) and not self._missing[self._next]:
                self._next += 1
                self.complete(self._next - 1)
        elif count > expected and min(self._holding[parameter]) < self._next:
            what = f"a gradient of {member.name!r} came when its sum was begun, other than in the first step"
            todo = "Call optimizer.begin_reduction() after the last backward pass only, or set it to False"
            raise UserError(Problem("hybrid_zero_optimizer.overlap_sync_grad", what, todo))


class BucketSum:
    """The sum of one bucket, on its way to this rank's part of it."""

    def __init__(
        self, flat: FlatParamGroup, number: int, process_groups: ProcessGroups, dtype: torch.dtype | None
    ) -> None:
        """Begin, inside the zero group; in ``dtype``, or that of the gradients."""
        self.flat, self.process_groups, bucket = flat, process_groups, flat.buckets[number]
        self._part = flat.grad_parts[number]
        self._pending: list[Pending] = []
        sent = flat.grads[bucket.first : bucket.last].to(dtype or flat.grads.dtype)  # itself, if that is its type
        runs = [slice(start - bucket.first, stop - bucket.first) for start, stop in pairwise(bucket.cuts)]
        self._own = sent[runs[flat.rank]]
        if bucket.is_even:
            self._pending = [begin_reduce_scatter(sent, process_groups.zero, self._own)]
        else:
            owned = [(rank, sent[run]) for rank, run in enumerate(runs) if run.start < run.stop]
            self._pending = [begin_reduce(part, process_groups.zero, rank) for rank, part in owned]

    def release_if_completed(self) -> None:
        """Give up buffers of what is there."""
        for pending in self._pending:
            pending.release_if_completed()

    def across_replicas(self) -> None:
        """Go on with the ranks that hold the same shard."""
        self._wait()
        self._pending = [begin_all_reduce(self._own, self.process_groups.replica)] if self._own.numel() else []

    def over_parts(self) -> None:
        """Put the sum where it belongs, and go on with ranks that have parts of it."""
        self._wait()
        if self._own.data_ptr() != self._part.data_ptr():
            self._part.copy_(self._own)
        partial = self.flat.kind.partial_over
        if partial is not None and self._part.numel():
            self._pending = [begin_all_reduce(self._part, self.process_groups.of_partial(partial))]

    def end(self) -> None:
        """It is all there."""
        self._wait()

    def _wait(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending = []


class Reducer:
    """Sums the gradients of a step; ``dtype`` as for :class:`BucketSum`."""

    def __init__(
        self, flats: Sequence[FlatParamGroup], process_groups: ProcessGroups, dtype: torch.dtype | None, overlap: bool
    ) -> None:
        self.process_groups, self.dtype = process_groups, dtype
        self.buckets = in_forward_order(flats)[::-1]
        self.begun: list[BucketSum] = []
        members = [flat.members_of(number) for flat, number in self.buckets]
        self._arrivals = GradReadyTracker(members, self._begin) if overlap else None

    def begin_step(self, micro_batches: int | None) -> None:
        """Gradients of so many micro-batches will follow; None: nobody knows, so nothing is begun before the end."""
        self.forget()
        if self._arrivals:
            self._arrivals.begin_step(micro_batches)

    def forget(self) -> None:
        """What a step that was broken off has begun."""
        for each in self.begun:
            each.end()
        self.begun = []

    def begin(self) -> None:
        """All gradients are complete: begin whatever is not on its way."""
        if self._arrivals:
            self._arrivals.end_step()
        for number in range(len(self.begun), len(self.buckets)):
            self._begin(number)

    def reduce(self) -> None:
        """Have the sums of all gradients, which are complete, in each ``grad_parts``."""
        self.begin()
        for stage in (BucketSum.across_replicas, BucketSum.over_parts, BucketSum.end):
            for each in self.begun:
                stage(each)
        self.begin_step(None)

    def _begin(self, number: int) -> None:
        for each in self.begun:
            each.release_if_completed()
        flat, bucket = self.buckets[number]
        self.begun.append(BucketSum(flat, bucket, self.process_groups, self.dtype))
