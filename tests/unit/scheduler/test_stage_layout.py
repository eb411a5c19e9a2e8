"""How many layers each virtual stage has."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.core.scheduler.stage_layout import balanced_partition, uniform_partition


@pytest.mark.parametrize(
    ("layers", "parts", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (9, 4, [2, 2, 3, 2]), (10, 4, [2, 3, 3, 2]), (11, 4, [3, 3, 3, 2]), (5, 1, [5])],
)
def test_uniform_leaves_the_last_part_the_fewest(layers: int, parts: int, sizes: list[int]) -> None:
    assert uniform_partition(layers, parts) == sizes


@given(st.integers(1, 16), st.integers(0, 100))
def test_uniform_is_complete_and_even(parts: int, more: int) -> None:
    sizes = uniform_partition(parts + more, parts)
    assert (len(sizes), sum(sizes)) == (parts, parts + more)
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


def loads(costs: list[int], sizes: list[int], first: int, last: int) -> list[int]:
    """What each part costs."""
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    each = [sum(costs[start:stop]) for start, stop in pairwise(ends)]
    each[0] += first
    each[-1] += last
    return each


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 20), st.integers(0, 20), st.data())
def test_balanced_is_the_best_of_all_cuts(costs: list[int], first: int, last: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), parts - 1)]
    every = [loads(costs, [b - a for a, b in pairwise(cut)], first, last) for cut in cuts]
    sizes = balanced_partition(costs, parts, first, last)
    assert (len(sizes), sum(sizes)) == (parts, len(costs))
    assert min(sizes) >= 1
    mine = loads(costs, sizes, first, last)
    assert (max(mine), -min(mine)) == min((max(each), -min(each)) for each in every)


def test_balanced_knows_the_embedding_and_the_head() -> None:
    assert balanced_partition([1.0] * 12, 4) == [3, 3, 3, 3]
    assert balanced_partition([1.0] * 12, 4, last=3.0) == [3, 4, 4, 1]
    assert balanced_partition([1.0] * 12, 4, first=2.0, last=2.0) == [2, 4, 4, 2]


def test_parts_of_equal_layers_are_equal_in_whatever_order() -> None:
    """Both cuts make parts of 0.7 and 0.8, though 0.1 + 0.3 + 0.1 + 0.3 added up from the left is another number than
    0.1 + 0.3 + 0.3 + 0.1. So it is a tie, which goes to fewer layers in front."""
    assert balanced_partition([0.1, 0.3, 0.3, 0.1, 0.3, 0.1, 0.3], 2) == [3, 4]
    assert balanced_partition([0.1] * 30, 10) == [3] * 10
