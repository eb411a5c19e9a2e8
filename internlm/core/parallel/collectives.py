"""Collectives over a process group; a group of one rank costs nothing."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``tensor`` over the group, in place."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def broadcast(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Make ``tensor`` what it is on the first rank of the group, in place."""
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=0)
    return tensor


def reduce_scatter(shard: Tensor, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``whole`` over the group; this rank's part of it goes into ``shard``, which may be a view of ``whole``."""
    if group.size() > 1:
        dist.reduce_scatter_single(shard, whole, group=group)
    elif shard.data_ptr() != whole.data_ptr():
        shard.copy_(whole)
    return shard


def all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Put the shards of the group side by side into ``whole``, of which ``shard`` may be a view."""
    if group.size() > 1:
        dist.all_gather_single(whole, shard, group=group)
    elif shard.data_ptr() != whole.data_ptr():
        whole.copy_(shard)
    return whole
