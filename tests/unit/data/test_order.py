"""The order of samples: a permutation for each seed and epoch, with random access."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data import order
from internlm.data.order import EpochOrder, Piece, shuffled
from internlm.data.permutation import KeyedPermutation, Purpose


def samples_of(epoch: EpochOrder) -> list[int]:
    return [piece.sample for piece in epoch.samples(0, len(epoch))]


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_each_element_appears_once(size: int, seed: int, epoch: int) -> None:
    permutation = KeyedPermutation(size, seed, Purpose.ORDER, epoch)
    elements = permutation(np.arange(size))
    assert sorted(elements.tolist()) == list(range(size))
    positions = np.arange(size)[::-7]
    assert permutation(positions).tolist() == elements[positions].tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_are_equally_frequent(size: int) -> None:
    count, orders = 1000, math.factorial(size)
    keys = (KeyedPermutation(size, 0, Purpose.ORDER, epoch) for epoch in range(count))
    found = Counter(tuple(key(np.arange(size)).tolist()) for key in keys)
    expected = count / orders
    chi_square = sum((found[each] - expected) ** 2 / expected for each in itertools.permutations(range(size)))
    assert chi_square < orders + 4 * math.sqrt(2 * orders)


def test_epochs_are_shuffled_each_in_its_own_way() -> None:
    lengths = np.ones(100, np.int64)
    orders = [samples_of(shuffled(lengths, None, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(samples) == list(range(100)) for samples in orders)
    assert len({tuple(samples) for samples in [*orders, list(range(100))]}) == 5
    assert orders[0] == samples_of(shuffled(lengths, None, 0, 0))
    assert samples_of(EpochOrder(lengths, None, None)) == list(range(100))


def test_the_order_is_the_same_forever() -> None:
    lengths = np.ones(300, np.int64)
    assert samples_of(shuffled(lengths, None, seed=1024, index=3))[:8] == [194, 19, 257, 104, 92, 144, 142, 290]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 200), st.integers(0, 60), st.booleans())
def test_pieces_are_those_of_the_stream_of_tokens(lengths: list[int], start: int, size: int, shuffle: bool) -> None:
    """With blocks of four samples, so that pieces come from several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", 4)
        counts = np.array(lengths)
        permutation = KeyedPermutation(len(counts), 5, Purpose.ORDER, 0) if shuffle else None
        epoch = EpochOrder(counts, None, permutation)
        stream = [(sample, token) for sample in samples_of(epoch) for token in range(lengths[sample])]
        pieces = epoch.between(start, start + size)
        assert [(p.sample, token) for p in pieces for token in range(p.begin, p.stop)] == stream[start : start + size]
        assert all(piece.length == lengths[piece.sample] and piece.begin < piece.stop for piece in pieces)


def test_samples_are_truncated() -> None:
    epoch = EpochOrder(np.array([3, 9]), 5, None)
    assert epoch.samples(0, 9) == [Piece(0, 3, 0, 3), Piece(1, 5, 0, 5)]
    assert epoch.between(2, 100) == [Piece(0, 3, 2, 3), Piece(1, 5, 0, 5)]
