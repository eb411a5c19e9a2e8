"""All-gather of updated parameters: every rank gets the values that other ranks own.

Eager: all buckets are gathered right after the update, which blocks until they are complete.

Lazy (``overlap_sync_param``): only buckets with a parameter outside of the declared blocks
(:mod:`internlm.core.parallel.blocks`) are gathered eagerly. These hold embedding, final norm and head, or all
parameters of a model that declares no blocks. The forward pass of a block waits for the all-gather of its buckets, and
launches the all-gather of the next block's buckets, which overlaps with the computation of this block.

Lazily gathered parameters of a block are up to date once the block, a module within it, or
:func:`~internlm.core.parallel.param_state.wait_for_all_gather` is called. All parameters are up to date once the
model's forward pass has ended, or after ``optimizer.gather_parameters()``. Other reads of a block's parameters do not
wait, and may return old values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from internlm.core.context.group import Group
from internlm.core.parallel.blocks import declared_blocks, is_compiled
from internlm.core.parallel.collectives import Pending, begin_all_gather, begin_broadcast
from internlm.core.parallel.param_state import set_wait_for_all_gather
from internlm.solver.optimizer.flat_buffers import FlatParamGroup, GroupBucket, buckets_in_forward_order
from internlm.utils.errors import Problem, UserError


class ParamGatherer:
    """Gatherer of the parameters in ``groups`` over the ``zero`` group, eager until :meth:`gather_lazily` is called.

    Buckets have one fixed order: eager buckets first, then lazy buckets in forward order. All-gathers are always
    launched in this order, whichever blocks a rank calls, so the collectives of all ranks match. The all-gathers
    of the first ``begun`` buckets have been launched, and those of the first ``ready`` buckets are complete.
    """

    def __init__(self, groups: Sequence[FlatParamGroup], zero: Group) -> None:
        self.zero = zero
        self.buckets = buckets_in_forward_order(groups)
        self.eager = self.begun = self.ready = len(self.buckets)
        self._pending: list[list[Pending]] = []  # collectives of each bucket that is launched and not ready
        self._needed: list[int] = []  # number of buckets that must be ready before each block runs

    def gather_lazily(self, model: nn.Module) -> None:
        """Switch to lazy gathering: from the next update on, gather a block's parameters before its forward pass."""
        blocks = list(declared_blocks(model).values()) if self.zero.size > 1 and self.buckets else []
        if not blocks:
            return
        # A bucket is lazy if all its parameters are inside blocks: modules outside of blocks have no hook that waits.
        inside = {module for block in blocks for module in block.modules()}
        beside = [module for module in model.modules() if module not in inside]
        outside = {parameter for module in beside for parameter in module.parameters(recurse=False)}
        is_lazy = [all(entry.named.parameter not in outside for entry in bucket.entries) for bucket in self.buckets]
        in_order = sorted(zip(is_lazy, self.buckets, strict=True), key=lambda pair: pair[0])  # stable: eager ones first
        self.buckets, self.eager = [bucket for _, bucket in in_order], is_lazy.count(False)
        bucket_of = {entry.named.parameter: i for i, bucket in enumerate(self.buckets) for entry in bucket.entries}
        for index, block in enumerate(blocks):
            self._needed.append(1 + max((bucket_of.get(parameter, -1) for parameter in block.parameters()), default=-1))
            for parameter in block.parameters():
                set_wait_for_all_gather(parameter, partial(self.wait_for_block, index))
            for module in _entrances(block):
                module.register_forward_pre_hook(partial(self._before_forward, index))
        # A forward pass may skip blocks. Their buckets must be gathered before gradients are sent over the same group:
        # otherwise ranks that skipped different blocks would launch these collectives in different orders.
        model.register_forward_hook(lambda *_: self.finish())
        model.register_state_dict_pre_hook(lambda *_: self.require_all("model.state_dict()"))

    def _before_forward(self, block: int, _module: nn.Module, _args: Any) -> None:
        self.wait_for_block(block)

    def wait_for_block(self, block: int) -> None:
        """Wait until the parameters of ``block`` are up to date, and launch the all-gathers of the next block."""
        if self.ready < len(self.buckets):
            self._wait(self._needed[block])
            # The maximum over all blocks so far: earlier blocks may have been skipped, or share a bucket with this one.
            self._begin(max(self._needed[: block + 2]))

    def require_all(self, where: str) -> None:
        """Raise an error unless all parameters are up to date.

        Operations that one rank may run alone call this method instead of an all-gather, which would block forever.

        Args:
            where: Name of the operation that needs the parameters, for the error message.

        Raises:
            UserError: Some parameters are not gathered yet.
        """
        if left := len(self.buckets) - self.ready:
            message = f"{left} of {len(self.buckets)} parameter buckets are not gathered yet (overlap_sync_param)"
            raise UserError(Problem(where, message, "Call optimizer.gather_parameters() on all ranks first"))

    def begin(self) -> None:
        """Gather the eager buckets after an update, and launch the all-gathers of the first block's buckets."""
        if self.zero.size > 1:
            self.begun = self.ready = 0
            self._begin(max([self.eager, *self._needed[:1]]))  # those of the first block overlap with the wait below
            self._wait(self.eager)

    def gather_all(self) -> None:
        """Gather all parameters again from the current shards of all ranks, and block until they are up to date."""
        if self.zero.size > 1:
            self.begun = self.ready = 0
            self.finish()

    def finish(self) -> None:
        """Block until all parameters are up to date."""
        self._wait(len(self.buckets))

    def _begin(self, count: int) -> None:
        """Launch the all-gathers of the first ``count`` buckets."""
        self._pending += [_begin_gather(bucket, self.zero) for bucket in self.buckets[self.begun : count]]
        self.begun = max(self.begun, count)

    def _wait(self, count: int) -> None:
        """Block until the first ``count`` buckets are gathered."""
        self._begin(count)
        while self.ready < count:
            for pending in self._pending.pop(0):
                pending.wait()
            self.ready += 1


def _begin_gather(bucket: GroupBucket, zero: Group) -> list[Pending]:
    """Launch the all-gather of one bucket, or one broadcast per shard if its shards differ in length."""
    bounds, values = bucket.bucket, bucket.group.values
    if bounds.is_even:
        return [begin_all_gather(values[bounds.shard(zero.rank)], zero, values[bounds.start : bounds.stop])]
    shards = [(rank, values[bounds.shard(rank)]) for rank in range(zero.size)]
    return [begin_broadcast(shard, zero, rank) for rank, shard in shards if shard.numel()]


def _entrances(block: nn.Module) -> list[nn.Module]:
    """Return the modules whose forward pass may be the first to read the parameters of ``block``.

    These are the block and every module in it with parameters of its own, because a model may call such a module
    directly. For a compiled block, only the block is returned: hooks inside it would be compiled again in each block.
    """
    if is_compiled(block):
        return [block]
    return [module for module in block.modules() if module is block or next(module.parameters(False), None) is not None]
