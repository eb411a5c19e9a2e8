"""The ways in which ranks form groups.

Rank layout: sizes to rank lists, for every :class:`ParallelMode`. Pure arithmetic, no process is started.

All modes are slices of one ``arange(world)``, reshaped. Fastest-varying first, a stage of the pipeline is seen in
three ways::

    ordinary   tensor, data
    weight     weight, weight-data              (isp: the same ranks, seen by shards of the weights)
    expert     expert-tensor, expert, expert-data

and the pipeline varies slowest in each. ZERO1 is a run of consecutive members of the data group (of the weight-data
group under isp); ZERO1_REPLICA joins the ranks that hold the same shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np


class ParallelMode(Enum):
    """A family of process groups; each rank is in exactly one group of each mode."""

    GLOBAL = "global"  # every rank
    DATA = "data"  # different samples
    MODEL = "model"  # one copy of the model: tensor x pipeline
    PIPELINE = "pipeline"  # different layers
    TENSOR = "tensor"  # different slices of a layer, or of the sequence
    ZERO1 = "zero1"  # different shards of one optimizer state
    ZERO1_REPLICA = "zero1_replica"  # the same shard of the optimizer state
    WEIGHT = "weight"  # isp: different shards of one weight
    WEIGHT_DATA = "weight_data"  # isp: the same shard of a weight, different data
    ISP_DATA = "isp_data"  # isp: different tokens, of the same samples or of others
    EXPERT = "expert"  # different experts
    EXPERT_DATA = "expert_data"  # the same experts, different data
    EXPERT_TENSOR = "expert_tensor"  # different slices of an expert


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share what. ``zero1`` ≤ 0 means the whole data (weight-data) group; ``expert`` ≤ 0 means 1."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    weight: int = 1
    zero1: int = -1
    expert: int = 1
    expert_tensor: int = 1
    isp: bool = False

    def __post_init__(self) -> None:
        for name, group in (("tensor", self.tensor), ("weight", self.weight), ("expert", self._expert_group)):
            if group < 1 or self.world % (self.pipeline * group):
                raise ValueError(
                    f"world size {self.world} is not divisible by pipeline {self.pipeline} x {name} {group} = "
                    f"{self.pipeline * group}"
                )
        if self.zero_parent % self.zero:
            raise ValueError(f"zero1 size {self.zero} does not divide the {self.zero_parent} ranks of its data group")

    @property
    def _expert_group(self) -> int:
        return max(self.expert, 1) * self.expert_tensor

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.world // (self.pipeline * self.tensor)

    @property
    def weight_data(self) -> int:
        """Ranks that hold the same shard of the weights."""
        return self.world // (self.pipeline * self.weight)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.pipeline * self._expert_group)

    @property
    def zero_parent(self) -> int:
        """Size of the group that ZERO1 divides."""
        return self.weight_data if self.isp else self.data

    @property
    def zero(self) -> int:
        """Ranks that share one optimizer state."""
        return self.zero1 if self.zero1 > 0 else self.zero_parent


class Layout:
    """The groups of every mode, as arrays of shape [groups, members]."""

    def __init__(self, sizes: ParallelSizes) -> None:
        self.sizes = sizes

    @cached_property
    def grids(self) -> dict[ParallelMode, np.ndarray]:
        """Mode to an array [groups, members] of global ranks."""
        s = self.sizes
        ranks = np.arange(s.world)
        ordinary = ranks.reshape(s.pipeline, s.data, s.tensor)
        weight = ranks.reshape(s.pipeline, s.weight_data, s.weight)
        expert = ranks.reshape(s.pipeline, s.expert_data, max(s.expert, 1), s.expert_tensor)
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
        """Every group of ``mode``."""
        return self.grids[mode].tolist()

    def group_of(self, rank: int, mode: ParallelMode) -> list[int]:
        """The group of ``mode`` that ``rank`` is in, in the order of local ranks."""
        grid = self.grids[mode]
        row = int(np.nonzero(grid == rank)[0][0])
        return grid[row].tolist()


def _along(grid: np.ndarray, axis: int) -> np.ndarray:
    """All lines of ``grid`` along ``axis``, as [lines, members]."""
    return np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
