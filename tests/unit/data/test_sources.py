"""Random samples, and the samples of one type of another source."""

from __future__ import annotations

import numpy as np
import pytest

from internlm.data.sources import OneType, RandomSource
from tests.unit.data.test_packing import ListSource


@pytest.mark.parametrize("fixed", [False, True])
def test_random_samples_are_a_function_of_the_seed(fixed: bool) -> None:
    one, same, other = (RandomSource(seed, 50, 64, fixed) for seed in (1, 1, 2))
    for sample in (9_999, 0, 17):
        assert one.read(sample).tolist() == same.read(sample).tolist() != other.read(sample).tolist()
        assert len(one.read(sample)) == one.lengths[sample]
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_random_samples_repeat_a_short_pattern() -> None:
    source = RandomSource(1, 50, 64, fixed_length=False)
    assert source.lengths.min() == 8
    assert source.lengths.max() == 64
    ids = np.concatenate([source.read(sample) for sample in range(500)])
    assert 0 == ids.min() < ids.max() == 49
    for sample in range(100):
        tokens = source.read(sample)
        assert any((tokens[period:] == tokens[:-period]).all() for period in range(2, min(9, len(tokens))))


def test_fixed_random_samples_are_uniform() -> None:
    source = RandomSource(1, 50, 64, fixed_length=True)
    assert set(source.lengths) == {64}
    counts = np.bincount(np.concatenate([source.read(sample) for sample in range(1000)]), minlength=50)
    assert len(counts) == 50
    assert abs(counts / 1280 - 1).max() < 0.15


@pytest.mark.parametrize("seq_len", [1, 2, 7])
def test_random_samples_may_be_short(seq_len: int) -> None:
    source = RandomSource(1, 2, seq_len, fixed_length=False)
    assert 1 <= source.lengths.min() <= source.lengths.max() <= seq_len


def test_one_type_of_a_source() -> None:
    source = OneType(ListSource([1], [2, 3], [4], [5, 6]), "y")
    assert [source.read(sample).tolist() for sample in range(2)] == [[2, 3], [5, 6]]
    assert source.lengths.tolist() == [2, 2]
    assert (source.types, source.type_ids.tolist()) == (["y"], [0, 0])
