"""Process groups from the rank layout, and the look-ups that users' scripts ask of ``global_context``.

Read by users and by the assembly layers only; everything below takes the groups it needs as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from internlm.config.schema import Config
from internlm.core.context.group import Group
from internlm.core.context.layout import Layout, ParallelMode, ParallelSizes
from internlm.core.context.random import RandomStreams, mode_seeds


def sizes_of(config: Config, world_size: int) -> ParallelSizes:
    """The sizes that ``config.parallel`` asks for on ``world_size`` ranks."""
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
    """This rank's groups, config and random streams. Empty until :meth:`initialize`."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self._made_in: dist.ProcessGroup | None = None
        self._clear()

    def _clear(self) -> None:
        self._config: Config | None = None
        self._layout: Layout | None = None
        self._streams: RandomStreams | None = None
        self._ranks: dict[ParallelMode, list[int]] = {}
        self._groups: dict[ParallelMode, dist.ProcessGroup] = {}
        self._rank, self._seed = 0, 0

    # -- life ---------------------------------------------------------------------------------------------------------
    def initialize(self, config: Config, seed: int) -> None:
        """Make the groups of every mode. ``torch.distributed`` must be up; every rank must call this with the same
        config."""
        self._config, self._seed = config, seed
        self._rank = dist.get_rank()
        self._layout = Layout(sizes_of(config, dist.get_world_size()))
        for mode in ParallelMode:
            self._ranks[mode] = self._layout.group_of(self._rank, mode)
            self._groups[mode] = self._group(tuple(self._ranks[mode]))
        local = self.get_local_rank
        self._streams = RandomStreams(
            mode_seeds(seed, local(ParallelMode.DATA), local(ParallelMode.PIPELINE), local(ParallelMode.TENSOR))
        )

    def _group(self, ranks: tuple[int, ...], use: str = "") -> dist.ProcessGroup:
        """One process group per set of ranks and ``use``, made by its members alone: each rank is in one group of a
        mode, and all walk the modes in the same order, so nobody waits in a circle, and thousands of ranks not for one
        another."""
        if self._made_in is not dist.group.WORLD:
            self._made, self._made_in = {}, dist.group.WORLD
        if (use, ranks) not in self._made:
            whole = len(ranks) == dist.get_world_size() and not use
            timeout = timedelta(seconds=self.config.parallel.timeout)
            group = dist.group.WORLD
            if not whole:
                group = dist.new_group(list(ranks), timeout, use_local_synchronization=True)
            assert group is not None
            self._made[use, ranks] = group
        return self._made[use, ranks]

    def destroy(self) -> None:
        """Forget everything, so that :meth:`initialize` may be called again. The process groups stay, for the next
        context in this process to use, and end with the default group: torch would give a new group of the same ranks
        the name, and with it the leftovers, of the old one."""
        self._clear()
        if not dist.is_initialized():
            self._made, self._made_in = {}, None

    @property
    def initialized(self) -> bool:
        """Whether :meth:`initialize` was called."""
        return self._config is not None

    # -- what was set up ----------------------------------------------------------------------------------------------
    @property
    def config(self) -> Config:
        """The resolved config of this run."""
        assert self._config is not None, "call internlm.initialize.initialize_distributed_env first"
        return self._config

    @property
    def layout(self) -> Layout:
        """The rank layout."""
        assert self._layout is not None, "call internlm.initialize.initialize_distributed_env first"
        return self._layout

    @property
    def random_streams(self) -> RandomStreams:
        """The random streams of this rank."""
        assert self._streams is not None, "call internlm.initialize.initialize_distributed_env first"
        return self._streams

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self._seed

    # -- look-ups -----------------------------------------------------------------------------------------------------
    def get_global_rank(self) -> int:
        """This rank among all."""
        return self._rank

    def is_initialized(self, mode: ParallelMode) -> bool:
        """Whether there is a group of ``mode``."""
        return mode in self._groups

    def is_using_parallel_mode(self, mode: ParallelMode) -> bool:
        """Whether ``mode`` has more than one rank."""
        return self.get_world_size(mode) > 1

    def get_group(self, mode: ParallelMode) -> dist.ProcessGroup:
        """This rank's process group of ``mode``."""
        return self._groups[mode]

    def group(self, mode: ParallelMode) -> Group:
        """The same, for the framework's own layers."""
        return Group.of(mode, self._groups[mode])

    def pair_of_stages(self, use: str, pairs: Sequence[tuple[int, int]]) -> Group:
        """A group for each of ``pairs`` of stages of this rank's pipeline, of which no stage is in two; a stage in none
        is alone. All ranks must ask, for the same pairs, and groups for another ``use`` are others.

        A rank that is alone makes a group nevertheless: torch names a group by the number of those that are there, so
        its members must have made equally many.
        """
        ranks = self._ranks[ParallelMode.PIPELINE]
        mine = next((pair for pair in pairs if self.get_local_rank(ParallelMode.PIPELINE) in pair), None)
        members = tuple(ranks[stage] for stage in mine) if mine else (self._rank,)
        return Group.of(ParallelMode.PIPELINE, self._group(members, use))

    def pipeline_ends(self) -> Group:
        """The first and the last stage of this rank's pipeline."""
        stages = self.get_world_size(ParallelMode.PIPELINE)
        return self.pair_of_stages("ends", [(0, stages - 1)] if stages > 1 else [])

    def get_ranks_in_group(self, mode: ParallelMode) -> list[int]:
        """Global ranks of that group, in the order of local ranks."""
        return list(self._ranks[mode])

    def get_world_size(self, mode: ParallelMode) -> int:
        """Ranks in that group."""
        return len(self._ranks[mode])

    def get_local_rank(self, mode: ParallelMode) -> int:
        """This rank's place in that group."""
        return self._ranks[mode].index(self._rank)

    def is_first_rank(self, mode: ParallelMode) -> bool:
        """Whether this rank comes first in that group."""
        return self.get_local_rank(mode) == 0

    def is_last_rank(self, mode: ParallelMode) -> bool:
        """Whether this rank comes last in that group."""
        return self.get_local_rank(mode) == self.get_world_size(mode) - 1

    def get_next_global_rank(self, mode: ParallelMode) -> int:
        """The global rank after this one in that group, the first after the last."""
        return self._ranks[mode][(self.get_local_rank(mode) + 1) % self.get_world_size(mode)]

    def get_prev_global_rank(self, mode: ParallelMode) -> int:
        """The global rank before this one in that group, the last before the first."""
        return self._ranks[mode][(self.get_local_rank(mode) - 1) % self.get_world_size(mode)]

    def is_pipeline_first_stage(self) -> bool:
        """Whether this rank holds the first layers."""
        return self.is_first_rank(ParallelMode.PIPELINE)

    def is_pipeline_last_stage(self) -> bool:
        """Whether this rank holds the last layers."""
        return self.is_last_rank(ParallelMode.PIPELINE)

    def is_no_pp_or_last_stage(self) -> bool:
        """Whether this rank computes the loss, which in a V the first stage does."""
        in_a_v = self.config.parallel.pipeline.mode == "ZBV"
        return self.is_pipeline_first_stage() if in_a_v else self.is_pipeline_last_stage()

    def is_rank_for_log(self) -> bool:
        """Whether this rank writes the log: the first of its data and tensor groups, on the last stage."""
        return (
            self.is_first_rank(ParallelMode.DATA)
            and self.is_first_rank(ParallelMode.TENSOR)
            and self.is_pipeline_last_stage()
        )


#: The context of this process.
global_context = ParallelContext()
