"""A process group of one, for what wants a group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode


@pytest.fixture
def alone() -> Iterator[Group]:
    """The group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group.of(ParallelMode.ZERO1, dist.group.WORLD)
    dist.destroy_process_group()
