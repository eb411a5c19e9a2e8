"""Rank layout: the rank lists of the process groups of every parallel mode, computed from the parallel sizes.

The groups of a mode are slices of ``arange(world)``, reshaped to a grid. The ranks of a pipeline stage form three
alternative grids, listed with the fastest-varying mode first::

    ordinary   tensor, data
    weight     weight, weight-data              (for isp)
    expert     expert-tensor, expert, expert-data

The pipeline varies slowest in each grid. Tensor varies fastest because its collectives are on the critical path of
every layer, and consecutive ranks share a machine (Megatron, arXiv 2104.04473, sec. 3). A ZERO1 group consists of
consecutive members of the data group (of the weight-data group under isp); a ZERO1_REPLICA group consists of the ranks
that hold the same shard of the optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np


class ParallelMode(Enum):
    """Parallel mode: a partition of all ranks into process groups, so that each rank is in one group of each mode."""

    GLOBAL = "global"  # every rank
    DATA = "data"  # different samples
    MODEL = "model"  # one copy of the model: tensor x pipeline
    PIPELINE = "pipeline"  # different layers
    TENSOR = "tensor"  # different slices of a layer, or of the sequence
    ZERO1 = "zero1"  # different shards of the optimizer state
    ZERO1_REPLICA = "zero1_replica"  # the same shard of the optimizer state
    WEIGHT = "weight"  # isp: different shards of one weight
    WEIGHT_DATA = "weight_data"  # isp: the same shard of a weight, different data
    ISP_DATA = "isp_data"  # isp: different tokens, of the same or of different samples
    EXPERT = "expert"  # different experts
    EXPERT_DATA = "expert_data"  # the same experts, different data
    EXPERT_TENSOR = "expert_tensor"  # different slices of an expert


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Sizes of the process groups.

    ``zero1`` ≤ 0 means the size of the data group (of the weight-data group under isp); ``expert`` ≤ 0 means 1.

    Raises:
        ValueError: A size is less than 1, the world size is not divisible by the pipeline size times the tensor, weight
            or expert size, or the data size (the weight-data size under isp) is not divisible by the ZeRO-1 size.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    weight: int = 1
    zero1: int = -1
    expert: int = 1
    expert_tensor: int = 1
    isp: bool = False

    def __post_init__(self) -> None:
        for name in ("world", "tensor", "pipeline", "weight", "expert_tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} size must be at least 1, got {getattr(self, name)}")
        for name, group in (("tensor", self.tensor), ("weight", self.weight), ("expert", self._expert_group)):
            if self.world % (self.pipeline * group):
                raise ValueError(
                    f"world size {self.world} is not divisible by pipeline {self.pipeline} x {name} {group} = "
                    f"{self.pipeline * group}"
                )
        if self.zero_parent % self.zero:
            parent = "weight-data" if self.isp else "data"
            raise ValueError(f"{parent} group size {self.zero_parent} is not divisible by zero1 size {self.zero}")

    @property
    def _expert_group(self) -> int:
        return max(self.expert, 1) * self.expert_tensor

    @property
    def data(self) -> int:
        """Size of the data group, whose ranks read different samples."""
        return self.world // (self.pipeline * self.tensor)

    @property
    def weight_data(self) -> int:
        """Size of the weight-data group, whose ranks hold the same shard of the weights."""
        return self.world // (self.pipeline * self.weight)

    @property
    def expert_data(self) -> int:
        """Size of the expert-data group, whose ranks hold the same experts."""
        return self.world // (self.pipeline * self._expert_group)

    @property
    def zero_parent(self) -> int:
        """Size of the group that is divided into ZERO1 groups: data, or weight-data under isp."""
        return self.weight_data if self.isp else self.data

    @property
    def zero(self) -> int:
        """Size of the ZeRO-1 group, over which the optimizer state is sharded."""
        return self.zero1 if self.zero1 > 0 else self.zero_parent


class Layout:
    """Rank lists of the process groups of every parallel mode."""

    def __init__(self, sizes: ParallelSizes) -> None:
        self.sizes = sizes

    @cached_property
    def grids(self) -> dict[ParallelMode, np.ndarray]:
        """Global ranks of the groups of each mode, as an int array per mode, [groups, members]."""
        s = self.sizes
        ranks = np.arange(s.world)
        ordinary = ranks.reshape(s.pipeline, s.data, s.tensor)
        weight = ranks.reshape(s.pipeline, s.weight_data, s.weight)
        expert = ranks.reshape(s.pipeline, s.expert_data, max(s.expert, 1), s.expert_tensor)
        # The last axis is the mode that varies faster than the data group: tensor, or weight under isp.
        zero = ranks.reshape(s.pipeline, s.zero_parent // s.zero, s.zero, -1)
        return {
            ParallelMode.GLOBAL: ranks[None],
            ParallelMode.DATA: _along(ordinary, 1),
            ParallelMode.MODEL: ordinary.swapaxes(0, 1).reshape(s.data, -1),
            ParallelMode.PIPELINE: _along(ordinary, 0),
            ParallelMode.TENSOR: _along(ordinary, 2),
            ParallelMode.ZERO1: _along(zero, 2),
            ParallelMode.ZERO1_REPLICA: _along(zero, 1),
            ParallelMode.WEIGHT: _along(weight, 2),
            ParallelMode.WEIGHT_DATA: _along(weight, 1),
            ParallelMode.ISP_DATA: ranks.reshape(s.pipeline, -1),
            ParallelMode.EXPERT: _along(expert, 2),
            ParallelMode.EXPERT_DATA: _along(expert, 1),
            ParallelMode.EXPERT_TENSOR: _along(expert, 3),
        }

    def groups(self, mode: ParallelMode) -> list[list[int]]:
        """Return the rank lists of all groups of ``mode``."""
        return self.grids[mode].tolist()

    def group_of(self, rank: int, mode: ParallelMode) -> list[int]:
        """Return the global ranks of the group of ``mode`` that contains ``rank``, in the order of local ranks."""
        grid = self.grids[mode]
        # Each rank is in exactly one row.
        row = int(np.nonzero(grid == rank)[0][0])
        return grid[row].tolist()


def _along(grid: np.ndarray, axis: int) -> np.ndarray:
    """Return all one-dimensional slices of ``grid`` along ``axis``, one per row: [slices, length of the axis]."""
    return np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
