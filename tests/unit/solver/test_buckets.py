"""The layout of flat buffers: every element once, whatever the sizes, the number of shards and the buckets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.solver.optimizer.flat_buffers import ALIGNMENT, Layout, lay_out, padded
from internlm.utils.errors import ConfigError

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=30)
SHARDS = st.integers(1, 9)
LIMITS = st.integers(1, 20000)


@given(st.integers(1, 10**12), st.integers(1, 4096))
def test_padding_makes_equal_aligned_shards(numel: int, shards: int) -> None:
    total = padded(numel, shards)
    assert total % (shards * ALIGNMENT) == 0
    assert 0 <= total - numel < shards * ALIGNMENT


def assert_a_partition(layout: Layout, sizes: list[int], shards: int) -> None:
    """No two parameters overlap, all lie in the buffer, buckets and shards follow one another without gaps, aligned."""
    spans = sorted((start, start + size) for start, size in zip(layout.starts, sizes, strict=True))
    assert spans[0][0] >= 0
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert spans[-1][1] <= layout.numel
    assert layout.buckets[0].start == 0
    assert all(one.stop == other.start for one, other in pairwise(layout.buckets))
    bounds = [bound for bucket in layout.buckets for bound in bucket.bounds]
    assert bounds == sorted(bounds)
    assert all(bound % ALIGNMENT == 0 for bound in bounds)
    assert {len(bucket.bounds) for bucket in layout.buckets} == {shards + 1}
    assert sum(layout.owned(rank) for rank in range(shards)) == layout.numel


@given(SIZES, SHARDS, LIMITS)
def test_by_element(sizes: list[int], shards: int, limit: int) -> None:
    layout = lay_out(sizes, shards, limit)
    assert_a_partition(layout, sizes, shards)
    assert layout.numel == padded(sum(sizes), shards)
    assert list(layout.starts) == [sum(sizes[:number]) for number in range(len(sizes))]
    lengths = [bucket.stop - bucket.start for bucket in layout.buckets]
    assert all(bucket.is_even for bucket in layout.buckets)
    assert max(lengths) <= max(limit, shards * ALIGNMENT)
    assert max(lengths) - min(lengths) <= shards * ALIGNMENT


@given(SIZES, SHARDS, LIMITS)
def test_by_parameter(sizes: list[int], shards: int, limit: int) -> None:
    layout = lay_out(sizes, shards, limit, by_parameter=True)
    assert_a_partition(layout, sizes, shards)
    owners = [_owner(layout, start, start + size) for start, size in zip(layout.starts, sizes, strict=True)]
    assert None not in owners  # every parameter lies whole in one shard
    for bucket in layout.buckets:
        inside = [size for start, size in zip(layout.starts, sizes, strict=True) if bucket.start <= start < bucket.stop]
        assert len(inside) == 1 or sum(inside) <= limit
    assert layout.numel < sum(sizes) + ALIGNMENT * shards * len(layout.buckets) or layout.numel == padded(sum(sizes), 1)


def _owner(layout: Layout, start: int, stop: int) -> int | None:
    shards = [(rank, shard) for bucket in layout.buckets for rank, shard in enumerate(pairwise(bucket.bounds))]
    return next((rank for rank, (first, last) in shards if first <= start and stop <= last), None)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), SHARDS)
def test_owners_are_balanced(sizes: list[int], shards: int) -> None:
    """Nobody has more than a fair share and the largest parameter (Graham 1969); aligned."""
    layout = lay_out(sizes, shards, 10**9, by_parameter=True)
    assert max(map(layout.owned, range(shards))) <= sum(sizes) / shards + max(sizes) + ALIGNMENT


@pytest.mark.parametrize(
    ("by_parameter", "starts", "bounds"),
    [
        (False, (0, 100, 300), [(0, 192, 384)]),
        (True, (192, 0, 292), [(0, 192, 384)]),
    ],
)
def test_examples(by_parameter: bool, starts: tuple[int, ...], bounds: list[tuple[int, ...]]) -> None:
    """By parameter the second, the largest, is the first rank's, and the others the second's."""
    sizes = [100, 200, 40] if not by_parameter else [100, 180, 40]
    layout = lay_out(sizes, 2, 10**6, by_parameter)
    assert (layout.starts, [bucket.bounds for bucket in layout.buckets]) == (starts, bounds)


def test_buckets_far_too_small_for_the_model_are_refused() -> None:
    """As where a hidden size has three zeros too many: a list of them would fill the memory."""
    with pytest.raises(ConfigError) as caught:
        lay_out([6 * 10**15], 8, 2**24)
    assert str(caught.value) == (
        "hybrid_zero_optimizer.reduce_bucket_size: 16777216 splits 6000000000000000 elements into 357627869 buckets. "
        "Use larger buckets, or a smaller model"
    )
