"""Parameters that are shared by the zero group from the start (:mod:`internlm.core.parallel.fully_sharded`).

A rank owns what it holds. That is the main parameters: what is computed with is made of them when it is gathered.
Gradients come reduced inside the zero group. They lie in one buffer; a part of the shard is what there is of one
parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from internlm.core.parallel.collectives import begin_all_reduce
from internlm.core.parallel.fully_sharded import local_shard, set_grad
from internlm.solver.optimizer.param_groups import NamedParameter, ParamGroup, ParamGroupKey, ProcessGroups, ShardSlice


class FullyShardedGroup(ParamGroup):
    """Parameters of one kind that are shared."""

    def __init__(self, kind: ParamGroupKey, parameters: Sequence[NamedParameter]) -> None:
        self.kind, self.parameters = kind, parameters
        self._runs = [local_shard(each.parameter) for each in parameters]
        self.main_parts = [run.flat for run in self._runs]
        self.grads = self.new_state()
        self.grad_parts = self.split(self.grads)
        for each, grad in zip(parameters, self.grad_parts, strict=True):
            set_grad(each.parameter, grad)

    def _first(self) -> tuple[str, Tensor, Tensor]:
        return self.parameters[0].name, self.parameters[0].parameter, self.main_parts[0]

    def pieces(self) -> Iterator[ShardSlice]:
        """One part each, which may be empty."""
        for number, (each, (flat, start)) in enumerate(zip(self.parameters, self._runs, strict=True)):
            yield ShardSlice(each.name, each.placement, start, start + len(flat), number, 0, len(flat))

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """Of the shard."""
        for each, grad in zip(self.parameters, self.grad_parts, strict=True):
            yield each.place, each.name, grad


class ReplicaReducer:
    """The sums that are left to do: over the replicas of each shard, in ``dtype`` if that is given, and over ranks that
    have parts of the sum besides."""

    def __init__(
        self, shards: Sequence[FullyShardedGroup], process_groups: ProcessGroups, dtype: torch.dtype | None
    ) -> None:
        self.shards, self.process_groups, self.dtype = [shard for shard in shards if shard.owned], process_groups, dtype

    def begin_step(self, micro_batches: int | None) -> None:
        """Nothing is begun before all gradients are there."""

    def begin(self) -> None:
        """As above."""

    def reduce(self) -> None:
        """Have the sums in each ``grads``."""
        if self.process_groups.replica.size > 1:
            sent = [shard.grads.to(self.dtype or shard.grads.dtype) for shard in self.shards]
            pending = [begin_all_reduce(each, self.process_groups.replica) for each in sent]
            for shard, each in zip(self.shards, pending, strict=True):
                shard.grads.copy_(each.wait())
        partial = [(shard.grads, shard.kind.partial_over) for shard in self.shards]
        over = [
            begin_all_reduce(grads, self.process_groups.of_partial(mode)) for grads, mode in partial if mode is not None
        ]
        for each in over:
            each.wait()
