"""Process groups of real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm.config import load_config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize import initialize_distributed_env
from internlm.utils.errors import ConfigError
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

Mode = ParallelMode
Groups = list[list[int]]

EACH: Groups = [[0], [1], [2], [3]]
ALL: Groups = [[0, 1, 2, 3]]
NEIGHBOURS: Groups = [[0, 1], [2, 3]]
EVEN_AND_ODD: Groups = [[0, 2], [1, 3]]

#: Settings of ``parallel``, and the groups that four ranks then form.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[ParallelMode, Groups]]] = {
    "data": ({}, {Mode.DATA: ALL, Mode.ZERO1: ALL, Mode.ZERO1_REPLICA: EACH, Mode.TENSOR: EACH, Mode.MODEL: EACH}),
    "zero in pairs": ({"zero1": 2}, {Mode.DATA: ALL, Mode.ZERO1: NEIGHBOURS, Mode.ZERO1_REPLICA: EVEN_AND_ODD}),
    "no zero": ({"zero1": 1}, {Mode.DATA: ALL, Mode.ZERO1: EACH, Mode.ZERO1_REPLICA: ALL}),
    "tensor": (
        {"tensor": 2},
        {Mode.TENSOR: NEIGHBOURS, Mode.DATA: EVEN_AND_ODD, Mode.MODEL: NEIGHBOURS, Mode.ZERO1: EVEN_AND_ODD},
    ),
    "pipeline": (
        {"pipeline": 2},
        {Mode.PIPELINE: EVEN_AND_ODD, Mode.DATA: NEIGHBOURS, Mode.MODEL: EVEN_AND_ODD, Mode.TENSOR: EACH},
    ),
    "isp": (
        {"tensor": {"size": 2, "mode": "isp"}, "weight": 4},
        {Mode.TENSOR: NEIGHBOURS, Mode.WEIGHT: ALL, Mode.WEIGHT_DATA: EACH, Mode.ZERO1: EACH, Mode.DATA: EVEN_AND_ODD},
    ),
    "isp, weights and sequences over the same ranks": (
        {"tensor": {"size": 2, "mode": "isp"}, "weight": 2},
        {Mode.TENSOR: NEIGHBOURS, Mode.WEIGHT: NEIGHBOURS, Mode.WEIGHT_DATA: EVEN_AND_ODD},
    ),
}


def _groups(rank: int, world_size: int, parallel: dict[str, Any]) -> dict[ParallelMode, list[int]]:
    """Each mode's group on this rank; that a group is what it says is checked by summing the ranks in it."""
    context = ParallelContext()
    context.initialize(load_config({**TINY, "parallel": parallel}, ["data.micro_num=4"], world_size=world_size), seed=1)
    for mode in ParallelMode:
        ranks, group = context.get_ranks_in_group(mode), context.get_group(mode)
        total = torch.tensor(rank)
        dist.all_reduce(total, group=group)
        assert total == sum(ranks), mode
        assert dist.get_process_group_ranks(group) == ranks, mode
        assert (context.get_world_size(mode), context.get_local_rank(mode)) == (group.size(), group.rank()), mode
        assert context.is_using_parallel_mode(mode) == (len(ranks) > 1), mode
        following, preceding = context.get_next_global_rank(mode), context.get_prev_global_rank(mode)
        assert ranks.index(following) == (group.rank() + 1) % len(ranks), mode
        assert ranks.index(preceding) == (group.rank() - 1) % len(ranks), mode
    found = {mode: context.get_ranks_in_group(mode) for mode in ParallelMode}
    # Groups of the same ranks share a communicator; only the weights of isp have one of their own.
    handles = {mode: context.get_group(mode) for mode, ranks in found.items() if len(ranks) > 1}
    if Mode.WEIGHT in handles:
        assert handles.pop(Mode.WEIGHT) is not handles.get(Mode.TENSOR)
    assert len(set(handles.values())) == len({tuple(found[mode]) for mode in handles})
    context.destroy()
    assert not context.initialized
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups(layout: str) -> None:
    parallel, expected = LAYOUTS[layout]
    found = run_ranks(4, _groups, parallel)
    for mode, groups in {Mode.GLOBAL: ALL, **expected}.items():
        assert [ranks[mode] for ranks in found] == [next(g for g in groups if rank in g) for rank in range(4)], mode


def test_groups_of_one_rank() -> None:
    (found,) = run_ranks(1, _groups, {})
    assert found == {mode: [0] for mode in ParallelMode}


def _sizes(rank: int, world_size: int) -> list[tuple[int, ...]]:
    """Sizes of the groups, by the names that published scripts read, in one layout after another."""
    sizes = []
    for layout in SIZES:
        initialize_distributed_env(TINY, overrides=("model.num_layers=4", "data.micro_num=4", *layout))
        data, pipeline = gpc.data_parallel_size, gpc.pipeline_parallel_size
        sizes.append((gpc.tensor_parallel_size, gpc.weight_parallel_size, data, pipeline, gpc.zero1_parallel_size))
        gpc.destroy()
    return sizes


#: Overrides, and the sizes of the groups of tensor, weight, data, pipeline and zero. No two groups have equal sizes in
#: all layouts.
SIZES: dict[tuple[str, ...], tuple[int, int, int, int, int]] = {
    ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=4"): (2, 4, 2, 1, 1),
    ("parallel.zero1.size=2",): (1, 1, 4, 1, 2),
    ("parallel.pipeline.size=2",): (1, 1, 2, 2, 2),
}


def test_sizes_by_their_published_names() -> None:
    assert run_ranks(4, _sizes) == [list(SIZES.values())] * 4


def _look_ups(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether this rank computes the loss, and whether it writes the log."""
    initialize_distributed_env(TINY, overrides=("model.num_layers=4", "data.micro_num=4", *overrides))
    found = gpc.is_no_pp_or_last_stage(), gpc.is_rank_for_log()
    gpc.destroy()
    return found


TWO_STAGES = ("parallel.pipeline.size=2", "parallel.tensor.size=2")  # ranks 0 and 1, and ranks 2 and 3


@pytest.mark.parametrize(
    ("overrides", "with_head", "logging"),
    [
        ((), [0, 1, 2, 3], 0),
        (TWO_STAGES, [2, 3], 2),
        ((*TWO_STAGES, "parallel.pipeline.mode=ZBV", "model.num_chunks=2"), [0, 1], 2),
    ],
    ids=["no pipeline", "1F1B", "ZBV"],
)
def test_the_stage_of_the_head_computes_the_loss_and_one_rank_logs(
    overrides: tuple[str, ...], with_head: list[int], logging: int
) -> None:
    found = run_ranks(4, _look_ups, overrides)
    assert [rank for rank, (computes_loss, _) in enumerate(found) if computes_loss] == with_head
    assert [rank for rank, (_, logs) in enumerate(found) if logs] == [logging]


def _again(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Sizes of the zero and data groups of one context after another, and a sum over each."""
    sizes = []
    for zero1 in (2, 4, 1, 2):
        initialize_distributed_env(TINY, overrides=(f"parallel.zero1.size={zero1}",))
        total = torch.ones(())
        dist.all_reduce(total, group=gpc.get_group(Mode.ZERO1))
        sizes.append((gpc.get_world_size(Mode.DATA), int(total)))
        gpc.destroy()
    dist.barrier()  # the default group is still there
    return sizes


def test_destroyed_and_made_again() -> None:
    assert run_ranks(4, _again) == [[(4, 2), (4, 4), (4, 1), (4, 2)]] * 4


def _disagree(rank: int, world_size: int, key: str) -> str:
    override, seed = (f"{key}={rank + 1}", 1) if key != "seed" else ("adam.lr=1", rank)
    with pytest.raises(ConfigError) as raised:
        initialize_distributed_env(TINY, overrides=(override,), seed=seed)
    assert not gpc.initialized
    return str(raised.value)


@pytest.mark.parametrize(("key", "where"), [("data.micro_num", "config"), ("seed", "--seed")])
def test_ranks_that_disagree(key: str, where: str) -> None:
    """They would wait for one another in the middle of a step, or train different models."""
    messages = run_ranks(2, _disagree, key)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{where}: differs between ranks (rank 0: ")
    assert "; rank 1: " in messages[0]
