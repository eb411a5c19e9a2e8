"""Process group with its parallel mode, rank and size, as passed to the framework's layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from internlm.core.context.layout import ParallelMode


@dataclass(frozen=True)
class Group:
    """Process group of one parallel mode, with its size and the rank of this process in it.

    Mode, rank and size are plain values, so that code that only computes shapes needs no process group.
    """

    mode: ParallelMode
    handle: dist.ProcessGroup | None = None  # None: a group of this rank alone
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, mode: ParallelMode, handle: dist.ProcessGroup) -> Group:
        """Wrap ``handle``, a ``torch.distributed`` process group of ``mode``."""
        return cls(mode, handle, dist.get_rank(handle), dist.get_world_size(handle))


#: Pipeline group of a run without a pipeline.
NO_PIPELINE = Group(ParallelMode.PIPELINE)
