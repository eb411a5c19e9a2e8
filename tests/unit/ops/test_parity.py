"""The comparison of ops with their references can fail, and does not fail of rounding alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.ops.parity import TOLERANCE, assert_parity, randn


def _constant(x: Tensor) -> Tensor:
    """Return ones by a formula whose exact gradient is zero."""
    return (x - x.detach()) * 0 + 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_op_that_is_off_by_more_than_its_tolerance_fails(dtype: torch.dtype) -> None:
    x = randn(50, dtype=dtype)
    assert_parity(lambda x: 2 * x, lambda x: 2 * x, x)
    with pytest.raises(AssertionError, match="output 0: off by"):
        assert_parity(lambda x: 2 * x, lambda x: 2 * (1 + 3 * TOLERANCE[dtype]) * x, x)


def test_a_wrong_gradient_fails_though_outputs_agree() -> None:
    with pytest.raises(AssertionError, match="gradient 0: off by"):
        assert_parity(lambda x: x + 2e-12 * (x - x.detach()), lambda x: x, randn(50))


def test_rounding_passes_where_the_exact_gradient_is_zero() -> None:
    assert_parity(lambda x: _constant(x) + 1e-16 * (x - x.detach()), _constant, randn(50))


def test_more_than_rounding_fails_where_the_exact_gradient_is_zero() -> None:
    with pytest.raises(AssertionError, match="gradient 0: off by"):
        assert_parity(lambda x: _constant(x) + 1e-14 * (x - x.detach()), _constant, randn(50))
