"""Parallel context: process groups, config and random streams of this rank, with look-up methods for scripts.

Only users' scripts and the code that assembles a run read ``global_context``; lower layers take the groups that they
need as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from internlm.config.schema import Config
from internlm.core.context.group import Group
from internlm.core.context.layout import Layout, ParallelMode, ParallelSizes
from internlm.core.context.random import RandomStreams, mode_seeds
from internlm.utils.errors import Problem, UserError


def sizes_of(config: Config, world_size: int) -> ParallelSizes:
    """Return the parallel sizes of ``config`` on ``world_size`` ranks."""
    parallel = config.parallel
    return ParallelSizes(
        world=world_size,
        tensor=parallel.tensor.size,
        pipeline=parallel.pipeline.size,
        weight=parallel.weight.size,
        zero1=parallel.zero1.size,
        expert=parallel.expert.size,
        isp=parallel.tensor.mode == "isp",
    )


class ParallelContext:
    """Process groups, config and random streams of this rank, set by :meth:`initialize`."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self._made_in: dist.ProcessGroup | None = None
        self._clear()

    def _clear(self) -> None:
        self._config: Config | None = None
        self._layout: Layout | None = None
        self._streams: RandomStreams | None = None
        self._ranks: dict[ParallelMode, list[int]] = _ByMode()
        self._groups: dict[ParallelMode, dist.ProcessGroup] = _ByMode()
        self._rank, self._seed = 0, 0

    # -- lifetime -----------------------------------------------------------------------------------------------------
    def initialize(self, config: Config, seed: int) -> None:
        """Create the process groups of every mode and seed the random streams.

        The default process group must exist, and every rank must call this with the same config.
        """
        self._config, self._seed = config, seed
        self._rank = dist.get_rank()
        self._layout = Layout(sizes_of(config, dist.get_world_size()))
        for mode in ParallelMode:
            self._ranks[mode] = self._layout.group_of(self._rank, mode)
            self._groups[mode] = self._group(tuple(self._ranks[mode]), self._use_of(mode))
        local = self.get_local_rank
        data, stage, tensor = local(ParallelMode.DATA), local(ParallelMode.PIPELINE), local(ParallelMode.TENSOR)
        owner = f"data-{data},pipeline-{stage}"
        self._streams = RandomStreams(
            mode_seeds(seed, data, stage, tensor),
            {ParallelMode.DATA: owner, ParallelMode.TENSOR: f"{owner},tensor-{tensor}"},
        )

    def _use_of(self, mode: ParallelMode) -> str:
        """Return the purpose of the group of ``mode``: groups of the same ranks are one group, but for isp's weights.

        A communicator of NCCL runs its collectives one after another. If the weight group has the same ranks as the
        tensor group, the all-to-all of attention would therefore queue behind the gathers of weights that are
        prefetched.
        """
        shared = mode is ParallelMode.WEIGHT and self._ranks[mode] == self._ranks[ParallelMode.TENSOR]
        return "weights" if shared and len(self._ranks[mode]) > 1 else ""

    def _group(self, ranks: tuple[int, ...], use: str = "") -> dist.ProcessGroup:
        """Return the process group of ``ranks`` for the purpose ``use``, and create it on the first call.

        Only the members create a group, which avoids a global barrier per group. Each rank is in one group of a mode,
        and all ranks create the groups in the same order of modes, so they cannot deadlock.
        """
        # Groups belong to the default group under which they were created; tests and notebooks may have replaced it.
        if self._made_in is not dist.group.WORLD:
            self._made, self._made_in = {}, dist.group.WORLD
        if (use, ranks) not in self._made:
            # A second group over all ranks would cost another set of connections, which take device memory under NCCL.
            whole = len(ranks) == dist.get_world_size() and not use
            timeout = timedelta(seconds=self.config.parallel.timeout)
            group = dist.group.WORLD
            if not whole:
                group = dist.new_group(list(ranks), timeout, use_local_synchronization=True)
            assert group is not None
            self._made[use, ranks] = group
        return self._made[use, ranks]

    def destroy(self) -> None:
        """Reset the context, so that :meth:`initialize` may be called again.

        The process groups are kept for reuse until the default group is destroyed: torch would give a new group of the
        same ranks the name of the old group, so the new group would read the old group's entries in the store.
        """
        self._clear()
        if not dist.is_initialized():
            self._made, self._made_in = {}, None

    @property
    def initialized(self) -> bool:
        """Whether :meth:`initialize` has been called, with no :meth:`destroy` since."""
        return self._config is not None

    # -- config and seeds ---------------------------------------------------------------------------------------------
    @property
    def config(self) -> Config:
        """Resolved config of this run."""
        if self._config is None:
            raise _not_initialized("config")
        return self._config

    @property
    def layout(self) -> Layout:
        """Rank layout of this run."""
        if self._layout is None:
            raise _not_initialized("layout")
        return self._layout

    @property
    def random_streams(self) -> RandomStreams:
        """Random streams of this rank."""
        if self._streams is None:
            raise _not_initialized("random_streams")
        return self._streams

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self._seed

    # -- look-ups -----------------------------------------------------------------------------------------------------
    def get_global_rank(self) -> int:
        """Return the global rank of this process."""
        return self._rank

    def is_initialized(self, mode: ParallelMode) -> bool:
        """Return whether the process group of ``mode`` has been created."""
        return mode in self._groups

    def is_using_parallel_mode(self, mode: ParallelMode) -> bool:
        """Return whether this rank's group of ``mode`` has more than one rank."""
        return self.get_world_size(mode) > 1

    def get_group(self, mode: ParallelMode) -> dist.ProcessGroup:
        """Return this rank's process group of ``mode``."""
        return self._groups[mode]

    def group(self, mode: ParallelMode) -> Group:
        """Return this rank's group of ``mode`` as a :class:`Group`, the form in which layers take it."""
        return Group.of(mode, self._groups[mode])

    def pair_of_stages(self, use: str, pairs: Sequence[tuple[int, int]]) -> Group:
        """Return the group of this rank's pair of stages; on stages that are in no pair, a group of this rank alone.

        All ranks must call this with the same arguments.

        Args:
            use: Purpose of the groups; a pair has a separate group for each purpose.
            pairs: Pairs of pipeline stages; each stage is in at most one pair.
        """
        ranks = self._ranks[ParallelMode.PIPELINE]
        own = next((pair for pair in pairs if self.get_local_rank(ParallelMode.PIPELINE) in pair), None)
        # A rank in no pair creates a group too: torch names a group by the number of groups created so far, which must
        # be the same on all members of a later group.
        members = tuple(ranks[stage] for stage in own) if own else (self._rank,)
        return Group.of(ParallelMode.PIPELINE, self._group(members, use))

    def pipeline_ends(self) -> Group:
        """Return the group of the pipeline's first and last stage; on other stages, a group of this rank alone."""
        stages = self.get_world_size(ParallelMode.PIPELINE)
        return self.pair_of_stages("ends", [(0, stages - 1)] if stages > 1 else [])

    def get_ranks_in_group(self, mode: ParallelMode) -> list[int]:
        """Return the global ranks of this rank's group of ``mode``, in the order of local ranks."""
        return list(self._ranks[mode])

    def get_world_size(self, mode: ParallelMode) -> int:
        """Return the size of this rank's group of ``mode``."""
        return len(self._ranks[mode])

    def get_local_rank(self, mode: ParallelMode) -> int:
        """Return the rank of this process within its ``mode`` group."""
        return self._ranks[mode].index(self._rank)

    # Names of existing scripts for the sizes of this rank's groups.
    tensor_parallel_size = property(lambda self: self.get_world_size(ParallelMode.TENSOR))
    weight_parallel_size = property(lambda self: self.get_world_size(ParallelMode.WEIGHT))
    data_parallel_size = property(lambda self: self.get_world_size(ParallelMode.DATA))
    pipeline_parallel_size = property(lambda self: self.get_world_size(ParallelMode.PIPELINE))
    zero1_parallel_size = property(lambda self: self.get_world_size(ParallelMode.ZERO1))
    expert_parallel_size = property(lambda self: self.get_world_size(ParallelMode.EXPERT))

    def is_first_rank(self, mode: ParallelMode) -> bool:
        """Return whether this rank is the first of its group of ``mode``."""
        return self.get_local_rank(mode) == 0

    def is_last_rank(self, mode: ParallelMode) -> bool:
        """Return whether this rank is the last of its group of ``mode``."""
        return self.get_local_rank(mode) == self.get_world_size(mode) - 1

    def get_next_global_rank(self, mode: ParallelMode) -> int:
        """Return the global rank of the next member of this rank's group of ``mode``, wrapping around."""
        return self._ranks[mode][(self.get_local_rank(mode) + 1) % self.get_world_size(mode)]

    def get_prev_global_rank(self, mode: ParallelMode) -> int:
        """Return the global rank of the previous member of this rank's group of ``mode``, wrapping around."""
        return self._ranks[mode][(self.get_local_rank(mode) - 1) % self.get_world_size(mode)]

    def is_pipeline_first_stage(self) -> bool:
        """Return whether this rank is on the first pipeline stage."""
        return self.is_first_rank(ParallelMode.PIPELINE)

    def is_pipeline_last_stage(self) -> bool:
        """Return whether this rank is on the last pipeline stage."""
        return self.is_last_rank(ParallelMode.PIPELINE)

    def is_no_pp_or_last_stage(self) -> bool:
        """Return whether this rank computes the loss.

        The loss is computed on the last pipeline stage. In a V-shaped schedule, it is computed on the first stage,
        which holds both the first and the last layers of the model.
        """
        v_shaped = self.config.parallel.pipeline.mode == "ZBV"
        return self.is_pipeline_first_stage() if v_shaped else self.is_pipeline_last_stage()

    def is_rank_for_log(self) -> bool:
        """Return whether this rank writes the log.

        True on the last pipeline stage for the rank that is first in both its data group and its tensor group.
        """
        return (
            self.is_first_rank(ParallelMode.DATA)
            and self.is_first_rank(ParallelMode.TENSOR)
            and self.is_pipeline_last_stage()
        )


class _ByMode(dict[ParallelMode, Any]):
    """Dict with an entry for each mode once the process groups exist."""

    def __missing__(self, mode: object) -> Any:
        if isinstance(mode, ParallelMode):
            raise _not_initialized(f"the group {mode.name}")
        todo = "Pass a ParallelMode, such as ParallelMode.DATA"
        raise UserError(Problem("global_context", f"expected a parallel mode, got {mode!r}", todo))


def _not_initialized(name: str) -> UserError:
    todo = "Call internlm.initialize.initialize_distributed_env first"
    return UserError(Problem("global_context", f"{name} is not set before the process groups exist", todo))


#: Context of this process.
global_context = ParallelContext()
