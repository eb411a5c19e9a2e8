"""A process group that knows what it is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from internlm.core.context.layout import ParallelMode


@dataclass(frozen=True)
class Group:
    """The ranks that share something, and this rank's place among them."""

    mode: ParallelMode
    handle: dist.ProcessGroup | None = None  # None: this rank is alone
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, mode: ParallelMode, handle: dist.ProcessGroup) -> Group:
        """Around a process group of torch's."""
        return cls(mode, handle, dist.get_rank(handle), dist.get_world_size(handle))


#: The stages of a pipeline that has one.
NO_PIPELINE = Group(ParallelMode.PIPELINE)
