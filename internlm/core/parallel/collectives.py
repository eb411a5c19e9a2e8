"""Collectives over a process group, counted in the communication ledger.

``begin_NAME`` starts a collective and returns a :class:`Pending`; ``NAME`` blocks and returns the result.
:func:`exchange` pairs a forward with a backward collective as one autograd function. In a group of one rank, nothing is
sent and collectives return their argument.

Names: ``whole`` is the tensor of the whole group, [n · rows, …] for n ranks; ``shard`` is this rank's part of it along
the first dimension, [rows, …].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.core.context.group import Group
from internlm.core.parallel.ledger import LEDGER
from internlm.utils.same_memory import same_memory


class Work(Protocol):
    """Protocol for a running collective, as returned by ``torch.distributed``."""

    def is_completed(self) -> bool:
        """Return whether the collective has completed, without blocking."""

    def wait(self) -> object:
        """Block until the collective has completed."""


class Pending:
    """Result of a collective that may still be running."""

    def __init__(self, result: Tensor, work: Work | None = None) -> None:
        self._result, self._work = result, work

    def release_if_completed(self) -> None:
        """Release the buffers of the collective if it has completed, without blocking."""
        if self._work is not None and self._work.is_completed():
            self.wait()

    def wait(self) -> Tensor:
        """Wait for the collective and return its result; on CUDA, only the current stream waits."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


# -- asynchronous collectives -----------------------------------------------------------------------------------------


def begin_all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Start an all-reduce of ``tensor`` over the group with ``op``, in place."""
    if group.size == 1:
        return Pending(tensor)
    LEDGER.record(group.mode, "all-reduce", 2 * (group.size - 1) * tensor.nbytes // group.size, tensor)
    return Pending(tensor, dist.all_reduce(tensor, op, group=group.handle, async_op=True))


def begin_reduce_scatter(whole: Tensor, group: Group, shard: Tensor | None = None) -> Pending:
    """Start a reduce-scatter: sum ``whole`` over the group and keep this rank's shard.

    Args:
        whole: Tensor to sum, [n · rows, …].
        group: Group of n ranks.
        shard: Output, [rows, …], which may be a view of ``whole``. None: allocate a tensor.
    """
    if group.size == 1:
        return Pending(whole if shard is None or same_memory(shard, whole) else shard.copy_(whole))
    if shard is None:
        shard = whole.new_empty(whole.shape[0] // group.size, *whole.shape[1:])
    LEDGER.record(group.mode, "reduce-scatter", (group.size - 1) * shard.nbytes, whole)
    whole = whole.contiguous()
    if whole.is_cpu:
        return Pending(shard, GlooReduceScatter(shard, whole, group.handle, group.size))
    return Pending(shard, dist.reduce_scatter_single(shard, whole, group=group.handle, async_op=True))


def begin_all_gather(shard: Tensor, group: Group, whole: Tensor | None = None) -> Pending:
    """Start an all-gather: concatenate the shards of all ranks along the first dimension.

    Args:
        shard: This rank's shard, [rows, …], of the same shape on every rank.
        group: Group of n ranks.
        whole: Output, [n · rows, …], of which ``shard`` may be a view. None: allocate a tensor.
    """
    if group.size == 1:
        return Pending(shard if whole is None or same_memory(shard, whole) else whole.copy_(shard))
    if whole is None:
        whole = shard.new_empty(shard.shape[0] * group.size, *shard.shape[1:])
    LEDGER.record(group.mode, "all-gather", (group.size - 1) * shard.nbytes, shard)
    shard = shard.contiguous()
    if whole.is_cpu:
        return Pending(whole, gloo_all_gather(whole, shard, group.handle, group.rank, group.size))
    return Pending(whole, dist.all_gather_single(whole, shard, group=group.handle, async_op=True))


def begin_reduce(tensor: Tensor, group: Group, root: int) -> Pending:
    """Start a reduce: sum ``tensor`` over the group, in place on rank ``root`` of the group.

    On all other ranks, the contents of ``tensor`` are undefined afterwards.
    """
    if group.size == 1:
        return Pending(tensor)
    LEDGER.record(group.mode, "reduce", 0 if group.rank == root else tensor.nbytes, tensor)
    return Pending(tensor, dist.reduce(tensor, group=group.handle, group_dst=root, async_op=True))


def begin_broadcast(tensor: Tensor, group: Group, root: int) -> Pending:
    """Start a broadcast of ``tensor`` from rank ``root`` of the group to all other ranks, in place."""
    if group.size == 1:
        return Pending(tensor)
    LEDGER.record(group.mode, "broadcast", tensor.nbytes if group.rank == root else 0, tensor)
    return Pending(tensor, dist.broadcast(tensor, group=group.handle, group_src=root, async_op=True))


def begin_all_to_all(slices: Tensor, group: Group) -> Pending:
    """Start an all-to-all of ``slices``: [n, …] → [n, …].

    Send ``slices[i]`` to rank i, and receive row i of the result from rank i.
    """
    if group.size == 1:
        return Pending(slices)
    LEDGER.record(group.mode, "all-to-all", (group.size - 1) * slices.nbytes // group.size, slices)
    received = torch.empty_like(slices, memory_format=torch.contiguous_format)
    work = dist.all_to_all_single(received, slices.contiguous(), group=group.handle, async_op=True)
    return Pending(received, work)


def pad_rows(tensor: Tensor, group: Group) -> Tensor:
    """Return ``tensor`` with rows of zeros at its end that make its rows a multiple of the group's size."""
    surplus = -tensor.shape[0] % group.size
    return F.pad(tensor, (0, 0, 0, surplus)) if surplus else tensor  # F.pad copies in any case


# -- blocking collectives ---------------------------------------------------------------------------------------------


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce ``tensor`` over the group with ``op``, in place, and return it."""
    return begin_all_reduce(tensor, group, op).wait()


def reduce_scatter(whole: Tensor, group: Group, shard: Tensor | None = None) -> Tensor:
    """Sum ``whole`` over the group and return this rank's shard: [n · rows, …] → [rows, …]."""
    return begin_reduce_scatter(whole, group, shard).wait()


def all_gather(shard: Tensor, group: Group, whole: Tensor | None = None) -> Tensor:
    """Concatenate the shards of all ranks along the first dimension: [rows, …] → [n · rows, …]."""
    return begin_all_gather(shard, group, whole).wait()


def all_to_all(slices: Tensor, group: Group) -> Tensor:
    """Send ``slices[i]`` to rank i and return the slices received from every rank: [n, …] → [n, …]."""
    return begin_all_to_all(slices, group).wait()


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """Copy ``tensor`` from the first rank of the group to all other ranks, in place, and return it."""
    return begin_broadcast(tensor, group, 0).wait()


# -- autograd ---------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor], Tensor]


def exchange(x: Tensor, forward: Step, backward: Step) -> Tensor:
    """Apply ``forward`` to ``x`` and, in the backward pass, ``backward`` to the gradient of the result.

    In tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198,
    section 4.2) the two functions are transposes of each other, such as identity and all-reduce, or all-gather and
    reduce-scatter.
    """
    y: Tensor = _Exchange.apply(x, forward, backward)
    return y


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Step, backward: Step) -> Tensor:
        ctx.backward_step = backward
        y = forward(x)
        # Autograd treats a returned input as modified in place; a view of it is a separate output.
        return y.view_as(y) if y is x else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_step(dy), None, None


# -- gloo -------------------------------------------------------------------------------------------------------------

# gloo implements reduce-scatter as an all-reduce of the whole tensor, and all-gather through a second buffer. Here,
# reduce-scatter is an all-to-all followed by a local sum, and all-gather is one broadcast from each rank, which takes a
# third to half of the time (doc/performance.md).


class GlooReduceScatter:
    """Running reduce-scatter on gloo: an all-to-all, followed by a local sum in :meth:`wait`."""

    def __init__(self, shard: Tensor, whole: Tensor, group: dist.ProcessGroup | None, ranks: int) -> None:
        self.shard, self.slices = shard, torch.empty_like(whole).view(ranks, *shard.shape)
        self.work = dist.all_to_all_single(self.slices.view_as(whole), whole, group=group, async_op=True)

    def is_completed(self) -> bool:
        """Return whether the slices of all ranks have arrived."""
        return bool(self.work.is_completed())

    def wait(self) -> None:
        """Block until all slices have arrived, and sum them in rank order, so that the result is reproducible."""
        self.work.wait()
        # Only after the wait: ``shard`` may be a view of ``whole``, which the all-to-all reads until it completes.
        torch.sum(self.slices, 0, out=self.shard)


class WorkList:
    """Several running collectives, combined into one :class:`Work`."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self.works = works

    def is_completed(self) -> bool:
        """Return whether all collectives have completed."""
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        """Block until all collectives have completed."""
        for work in self.works:
            work.wait()


def gloo_all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup | None, rank: int, ranks: int) -> WorkList:
    """Start an all-gather of ``shard`` into ``whole`` on gloo, implemented as one broadcast from each rank."""
    slices = whole.view(ranks, *shard.shape)
    if not same_memory(slices[rank], shard):
        slices[rank].copy_(shard)
    return WorkList([dist.broadcast(slices[i], group=group, group_src=i, async_op=True) for i in range(ranks)])
