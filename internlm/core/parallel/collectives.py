"""Two collectives of gloo's, made of its faster ones.

gloo reduce-scatters by reducing everything everywhere, and gathers through a buffer: it takes two to three times as
long as an exchange of the parts, which every rank sums for itself, and as a broadcast by each rank. See
doc/performance.md. What is sent is the same.

Collectives over a group, counted by the ledger; a group of one rank costs nothing.

Each comes in two forms: ``begin_…`` returns at once what can be waited for, the plain one waits.

One differentiable step between ranks, from what it does forward and what it does with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.core.context.group import Group
from internlm.core.parallel.ledger import LEDGER


class WorkList:
    """Several that are waited for together."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self.works = works

    def is_completed(self) -> bool:
        """Whether there is nothing to wait for."""
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        """All of them are done."""
        for work in self.works:
            work.wait()


class GlooReduceScatter:
    """The parts of a sum that are on their way; ``shard`` becomes it when they are waited for."""

    def __init__(self, shard: Tensor, whole: Tensor, group: dist.ProcessGroup | None, ranks: int) -> None:
        self.shard, self.parts = shard, torch.empty_like(whole).view(ranks, *shard.shape)
        self.work = dist.all_to_all_single(self.parts.view_as(whole), whole, group=group, async_op=True)

    def is_completed(self) -> bool:
        """Whether the parts are there."""
        return bool(self.work.is_completed())

    def wait(self) -> None:
        """In the order of the ranks, so that the sum is the same each time."""
        self.work.wait()
        torch.sum(self.parts, 0, out=self.shard)


def gloo_all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup | None, rank: int, ranks: int) -> WorkList:
    """Begin to put the shards side by side in ``whole``, each broadcast by the rank that has it."""
    parts = whole.view(ranks, *shard.shape)
    if parts[rank].data_ptr() != shard.data_ptr():
        parts[rank].copy_(shard)
    return WorkList([dist.broadcast(part, group=group, group_src=i, async_op=True) for i, part in enumerate(parts)])


class Work(Protocol):
    """What can be waited for."""

    def is_completed(self) -> bool: ...

    def wait(self) -> object: ...


class Pending:
    """A tensor that may still be on its way."""

    def __init__(self, result: Tensor, work: Work | None = None) -> None:
        self._result, self._work = result, work

    def release_if_completed(self) -> None:
        """Give up what it needs to come, if it is there."""
        if self._work is not None and self._work.is_completed():
            self.wait()

    def wait(self) -> Tensor:
        """The tensor, once it is there."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


def begin_all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Begin to sum ``tensor`` over the group, in place."""
    if group.size == 1:
        return Pending(tensor)
    LEDGER.record(group.mode, "all-reduce", 2 * (group.size - 1) * tensor.nbytes // group.size)
    return Pending(tensor, dist.all_reduce(tensor, op, group=group.handle, async_op=True))


def begin_reduce_scatter(whole: Tensor, group: Group, shard: Tensor | None = None) -> Pending:
    """Begin to sum ``whole`` over the group; this rank's part of the first dimension is the result, in ``shard`` where
    that is given (which may be a view of ``whole``)."""
    if group.size == 1:
        return Pending(whole if shard is None or shard.data_ptr() == whole.data_ptr() else shard.copy_(whole))
    if shard is None:
        shard = whole.new_empty(whole.shape[0] // group.size, *whole.shape[1:])
    LEDGER.record(group.mode, "reduce-scatter", (group.size - 1) * shard.nbytes)
    whole = whole.contiguous()
    if whole.is_cpu:
        return Pending(shard, GlooReduceScatter(shard, whole, group.handle, group.size))
    return Pending(shard, dist.reduce_scatter_single(shard, whole, group=group.handle, async_op=True))


def begin_all_gather(shard: Tensor, group: Group, whole: Tensor | None = None) -> Pending:
    """Begin to put the shards of the group side by side, along the first dimension; in ``whole`` where that is given
    (of which ``shard`` may be a view)."""
    if group.size == 1:
        return Pending(shard if whole is None or shard.data_ptr() == whole.data_ptr() else whole.copy_(shard))
    if whole is None:
        whole = shard.new_empty(shard.shape[0] * group.size, *shard.shape[1:])
    LEDGER.record(group.mode, "all-gather", (group.size - 1) * shard.nbytes)
    shard = shard.contiguous()
    if whole.is_cpu:
        return Pending(whole, gloo_all_gather(whole, shard, group.handle, group.rank, group.size))
    return Pending(whole, dist.all_gather_single(whole, shard, group=group.handle, async_op=True))


def begin_reduce(tensor: Tensor, group: Group, root: int) -> Pending:
    """Begin to sum ``tensor`` over the group, in place on its rank ``root``; elsewhere it is of no use then."""
    if group.size == 1:
        return Pending(tensor)
    LEDGER.record(group.mode, "reduce", 0 if group.rank == root else tensor.nbytes)
    return Pending(tensor, dist.reduce(tensor, group=group.handle, group_dst=root, async_op=True))


def begin_broadcast(tensor: Tensor, group: Group, root: int) -> Pending:
    """Begin to make ``tensor`` what it is on rank ``root`` of the group, in place."""
    if group.size == 1:
        return Pending(tensor)
    LEDGER.record(group.mode, "broadcast", tensor.nbytes if group.rank == root else 0)
    return Pending(tensor, dist.broadcast(tensor, group=group.handle, group_src=root, async_op=True))


def begin_all_to_all(parts: Tensor, group: Group) -> Pending:
    """Begin to send ``parts[i]`` to rank i; the result holds what each rank sent here. ``parts``: [size, ...]."""
    if group.size == 1:
        return Pending(parts)
    LEDGER.record(group.mode, "all-to-all", (group.size - 1) * parts.nbytes // group.size)
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    work = dist.all_to_all_single(received, parts.contiguous(), group=group.handle, async_op=True)
    return Pending(received, work)


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum ``tensor`` over the group, in place."""
    return begin_all_reduce(tensor, group, op).wait()


def reduce_scatter(whole: Tensor, group: Group, shard: Tensor | None = None) -> Tensor:
    """Sum ``whole`` over the group; this rank's part of it."""
    return begin_reduce_scatter(whole, group, shard).wait()


def all_gather(shard: Tensor, group: Group, whole: Tensor | None = None) -> Tensor:
    """The shards of the group side by side."""
    return begin_all_gather(shard, group, whole).wait()


def all_to_all(parts: Tensor, group: Group) -> Tensor:
    """What each rank of the group sent here."""
    return begin_all_to_all(parts, group).wait()


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """Make ``tensor`` what it is on the first rank of the group, in place."""
    return begin_broadcast(tensor, group, 0).wait()


Step = Callable[[Tensor], Tensor]


def exchange(x: Tensor, forward: Step, backward: Step) -> Tensor:
    """``forward(x)``, whose gradient is ``backward`` of the gradient of the result."""
    y: Tensor = _Exchange.apply(x, forward, backward)
    return y


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Step, backward: Step) -> Tensor:
        ctx.backward_step = backward
        y = forward(x)
        return y.view_as(y) if y is x else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_step(dy), None, None
