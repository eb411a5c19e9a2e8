"""Two collectives of gloo's, made of its faster ones.

gloo reduce-scatters by reducing everything everywhere, and gathers through a buffer: it takes two to three times as
long as an exchange of the parts, which every rank sums for itself, and as a broadcast by each rank. See
doc/performance.md. What is sent is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Works:
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


class SumOfParts:
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


def all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup | None, rank: int, ranks: int) -> Works:
    """Begin to put the shards side by side in ``whole``, each broadcast by the rank that has it."""
    parts = whole.view(ranks, *shard.shape)
    if parts[rank].data_ptr() != shard.data_ptr():
        parts[rank].copy_(shard)
    return Works([dist.broadcast(part, group=group, group_src=i, async_op=True) for i, part in enumerate(parts)])
