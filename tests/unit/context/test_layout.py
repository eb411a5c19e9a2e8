"""Rank layout: examples by hand, and what holds for any sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.core.context.layout import Layout, ParallelMode, ParallelSizes

LARGEST = 4096


def layout(**sizes: int | bool) -> Layout:
    return Layout(ParallelSizes(**sizes))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any valid sizes: a world, and divisors of it."""
    world = draw(st.one_of(st.integers(1, 64), st.integers(1, LARGEST), st.just(LARGEST)))

    def divisor(number: int) -> int:
        return draw(st.sampled_from([n for n in range(1, number + 1) if number % n == 0]))

    pipeline = divisor(world)
    stage = world // pipeline
    sizes = {"tensor": divisor(stage), "weight": divisor(stage), "expert": divisor(stage)}
    isp = draw(st.booleans())
    zero1 = draw(st.sampled_from([-1, 0, divisor(stage // sizes["weight" if isp else "tensor"])]))
    expert_tensor = divisor(stage // sizes["expert"])
    return layout(world=world, pipeline=pipeline, isp=isp, zero1=zero1, expert_tensor=expert_tensor, **sizes)


@given(layouts())
def test_each_rank_is_in_exactly_one_group_of_each_mode(any_layout: Layout) -> None:
    for mode in ParallelMode:
        assert np.array_equal(np.sort(any_layout.grids[mode], axis=None), np.arange(any_layout.sizes.world)), mode


@given(layouts())
def test_groups_are_as_large_as_asked(any_layout: Layout) -> None:
    s = any_layout.sizes
    wanted = {
        ParallelMode.GLOBAL: s.world,
        ParallelMode.DATA: s.data,
        ParallelMode.MODEL: s.tensor * s.pipeline,
        ParallelMode.PIPELINE: s.pipeline,
        ParallelMode.TENSOR: s.tensor,
        ParallelMode.ZERO1: s.zero,
        ParallelMode.ZERO1_REPLICA: s.zero_parent // s.zero,
        ParallelMode.WEIGHT: s.weight,
        ParallelMode.WEIGHT_DATA: s.weight_data,
        ParallelMode.ISP_DATA: s.world // s.pipeline,
        ParallelMode.EXPERT: s.expert,
        ParallelMode.EXPERT_DATA: s.expert_data,
        ParallelMode.EXPERT_TENSOR: s.expert_tensor,
    }
    assert {mode: grid.shape[1] for mode, grid in any_layout.grids.items()} == wanted


VIEWS = {
    "ordinary": (ParallelMode.DATA, ParallelMode.TENSOR, ParallelMode.PIPELINE),
    "weight": (ParallelMode.WEIGHT_DATA, ParallelMode.WEIGHT, ParallelMode.PIPELINE),
    "expert": (ParallelMode.EXPERT_DATA, ParallelMode.EXPERT, ParallelMode.EXPERT_TENSOR, ParallelMode.PIPELINE),
    "model": (ParallelMode.MODEL, ParallelMode.DATA),
}


@pytest.mark.parametrize("view", VIEWS)
@given(any_layout=layouts())
def test_the_modes_of_a_view_span_the_world(view: str, any_layout: Layout) -> None:
    """Sizes multiply to the world, and no two ranks have the same place in every mode of the view."""
    modes = VIEWS[view]
    world = any_layout.sizes.world
    assert math.prod(any_layout.grids[mode].shape[1] for mode in modes) == world
    places = np.zeros((world, len(modes)), int)
    for column, mode in enumerate(modes):
        grid = any_layout.grids[mode]
        places[grid, column] = np.arange(grid.shape[1])
    assert len(np.unique(places, axis=0)) == world


@given(layouts())
def test_zero1_is_a_run_of_consecutive_members_of_its_parent(any_layout: Layout) -> None:
    parent = ParallelMode.WEIGHT_DATA if any_layout.sizes.isp else ParallelMode.DATA
    runs = any_layout.grids[parent].reshape(-1, any_layout.sizes.zero)
    assert sorted(runs.tolist()) == sorted(any_layout.groups(ParallelMode.ZERO1))


@given(layouts())
def test_zero1_and_its_replicas_make_up_the_parent(any_layout: Layout) -> None:
    """A rank's parent group is the union of the zero groups of all ranks in its replica group."""
    parent = ParallelMode.WEIGHT_DATA if any_layout.sizes.isp else ParallelMode.DATA
    zero_of = {rank: group for group in any_layout.groups(ParallelMode.ZERO1) for rank in group}
    replicas_of = {rank: group for group in any_layout.groups(ParallelMode.ZERO1_REPLICA) for rank in group}
    for group in any_layout.groups(parent):
        assert sorted(rank for replica in replicas_of[group[0]] for rank in zero_of[replica]) == group


@pytest.mark.parametrize("mode", [ParallelMode.TENSOR, ParallelMode.WEIGHT, ParallelMode.EXPERT_TENSOR])
@given(any_layout=layouts())
def test_fastest_varying_modes_have_consecutive_ranks(mode: ParallelMode, any_layout: Layout) -> None:
    assert (np.diff(any_layout.grids[mode], axis=1) == 1).all()


@given(layouts(), st.integers(min_value=0))
def test_group_of_a_rank_holds_the_rank(any_layout: Layout, number: int) -> None:
    rank = number % any_layout.sizes.world
    for mode in ParallelMode:
        assert rank in any_layout.group_of(rank, mode)


EXAMPLES = {
    "8 ranks, tensor 2, pipeline 2": (
        layout(world=8, tensor=2, pipeline=2),
        {
            ParallelMode.TENSOR: [[0, 1], [2, 3], [4, 5], [6, 7]],
            ParallelMode.DATA: [[0, 2], [1, 3], [4, 6], [5, 7]],
            ParallelMode.PIPELINE: [[0, 4], [1, 5], [2, 6], [3, 7]],
            ParallelMode.MODEL: [[0, 1, 4, 5], [2, 3, 6, 7]],
            ParallelMode.ZERO1: [[0, 2], [1, 3], [4, 6], [5, 7]],
        },
    ),
    "isp: 8 ranks, tensor 2, weight 4": (
        layout(world=8, tensor=2, weight=4, isp=True),
        {
            ParallelMode.TENSOR: [[0, 1], [2, 3], [4, 5], [6, 7]],
            ParallelMode.DATA: [[0, 2, 4, 6], [1, 3, 5, 7]],
            ParallelMode.WEIGHT: [[0, 1, 2, 3], [4, 5, 6, 7]],
            ParallelMode.WEIGHT_DATA: [[0, 4], [1, 5], [2, 6], [3, 7]],
            ParallelMode.ZERO1: [[0, 4], [1, 5], [2, 6], [3, 7]],
        },
    ),
    "8 ranks, zero1 2": (
        layout(world=8, zero1=2),
        {
            ParallelMode.ZERO1: [[0, 1], [2, 3], [4, 5], [6, 7]],
            ParallelMode.ZERO1_REPLICA: [[0, 2, 4, 6], [1, 3, 5, 7]],
        },
    ),
    "isp: 8 ranks, weight 2, zero1 2": (
        layout(world=8, weight=2, zero1=2, isp=True),
        {
            ParallelMode.ZERO1: [[0, 2], [4, 6], [1, 3], [5, 7]],
            ParallelMode.ZERO1_REPLICA: [[0, 4], [2, 6], [1, 5], [3, 7]],
        },
    ),
    "8 ranks, expert 2, expert-tensor 2": (
        layout(world=8, tensor=2, expert=2, expert_tensor=2),
        {
            ParallelMode.EXPERT_TENSOR: [[0, 1], [2, 3], [4, 5], [6, 7]],
            ParallelMode.EXPERT: [[0, 2], [1, 3], [4, 6], [5, 7]],
            ParallelMode.EXPERT_DATA: [[0, 4], [1, 5], [2, 6], [3, 7]],
        },
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    example, wanted = EXAMPLES[name]
    for mode, groups in wanted.items():
        assert sorted(example.groups(mode)) == sorted(groups), mode


def test_4096_ranks() -> None:
    large = layout(world=4096, tensor=8, pipeline=16, zero1=4)
    assert large.group_of(4095, ParallelMode.TENSOR) == list(range(4088, 4096))
    assert large.group_of(4095, ParallelMode.PIPELINE) == list(range(255, 4096, 256))
    assert large.group_of(4095, ParallelMode.ZERO1) == [4071, 4079, 4087, 4095]
    assert large.group_of(0, ParallelMode.ZERO1_REPLICA) == list(range(0, 256, 32))


WRONG = {
    "world size 6 is not divisible by pipeline 1 x tensor 4 = 4": dict(world=6, tensor=4),
    "world size 8 is not divisible by pipeline 3 x tensor 1 = 3": dict(world=8, pipeline=3),
    "world size 8 is not divisible by pipeline 2 x tensor 8 = 16": dict(world=8, pipeline=2, tensor=8),
    "world size 8 is not divisible by pipeline 1 x weight 3 = 3": dict(world=8, weight=3),
    "world size 8 is not divisible by pipeline 1 x expert 6 = 6": dict(world=8, expert=3, expert_tensor=2),
    "pipeline size must be at least 1, got 0": dict(world=8, pipeline=0),
    "tensor size must be at least 1, got 0": dict(world=8, tensor=0),
    "weight size must be at least 1, got -2": dict(world=8, weight=-2),
    "world size must be at least 1, got 0": dict(world=0),
    "expert_tensor size must be at least 1, got 0": dict(world=8, expert_tensor=0),
    "data group size 4 is not divisible by zero1 size 3": dict(world=8, tensor=2, zero1=3),
    "weight-data group size 2 is not divisible by zero1 size 4": dict(world=8, weight=4, zero1=4, isp=True),
}


@pytest.mark.parametrize("message", WRONG)
def test_sizes_that_do_not_fit(message: str) -> None:
    with pytest.raises(ValueError, match="^" + message + "$"):
        ParallelSizes(**WRONG[message])
