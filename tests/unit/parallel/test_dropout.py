"""Dropout: what a mask depends on, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.core.parallel.dropout import (
    VALUES,
    Dropout,
    DropoutKey,
    current_dropout_key,
    dropout_key_scope,
    keep_mask,
)
from internlm.utils.errors import UserError

TOKENS, WIDTH = 64, 32
KEY = DropoutKey(seed=5, data_rank=1, step=3, micro_num=4, micro_index=2)


def ones(tokens: int = TOKENS) -> Tensor:
    return torch.ones(tokens, WIDTH, dtype=torch.float64, requires_grad=True)


def dropout(key: DropoutKey = KEY, rate: float = 0.25, keeps_masks: bool = False) -> Dropout:
    return Dropout(rate, keeps_masks, key, TOKENS)


def test_a_part_is_dropped_and_the_rest_scaled_up() -> None:
    y = dropout()(0, "attention", ones())
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert (y == 0).double().mean() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1 - 1e-9])
def test_the_expectation_stays_at_any_rate(rate: float) -> None:
    """The rate is rounded, and the factor follows it."""
    drop = dropout(rate=rate)
    kept = 1 - drop.dropped_values / VALUES
    assert kept == pytest.approx(1 - rate, abs=2**-16)
    assert kept * drop.scale == pytest.approx(1, rel=1e-12)
    y = drop(0, "attention", ones())
    assert (y != 0).double().mean() == pytest.approx(kept, abs=0.03)
    assert set(y.unique().tolist()) <= {0.0, drop.scale}


@pytest.mark.parametrize("width", [8, 7])
def test_masks_are_their_formula_in_pythons_own_integers(width: int) -> None:
    """Hence they are the same on all devices."""
    mask = keep_mask(SEED, range(3, 20), width, 20000, torch.device("cpu"))
    assert mask.tolist() == [[_keeps(row, column) for column in range(width)] for row in range(3, 20)]


SEED = 2**63 - 12345


def _keeps(row: int, column: int) -> bool:
    x = (_split_mix(2 * row) | 1) * (_split_mix(2 * (column // 4) + 1) | 1)
    x = _added_upper(_added_upper(x) * 0xD6E8FEB86659FD93)
    value = x >> 16 * (column % 4) & 0xFFFF
    return (value ^ 0x8000) >= 20000  # signed values are compared


def _added_upper(x: int) -> int:
    """Its upper half is a signed number."""
    upper = (x & U64) >> 32
    return (x + upper - (upper >> 31 << 32)) & U64


U64 = 2**64 - 1


def _split_mix(index: int) -> int:
    x = (SEED + (index + 1) * 0x9E3779B97F4A7C15) & U64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & U64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & U64
    return x ^ x >> 31


def test_elements_of_a_mask_are_independent() -> None:
    """Means of rows and columns, and products of neighbours and of the corners of rectangles, are as by chance."""
    rate, size = 0.25, 1024
    x = keep_mask(7, range(size), size, int(rate * VALUES), torch.device("cpu")).double() - (1 - rate)
    x = x / (rate * (1 - rate)) ** 0.5  # mean 0, variance 1
    assert abs(x.sum()) < 4 * size
    for means in (x.mean(0), x.mean(1)):
        assert (means.square().mean() * size).item() == pytest.approx(1, abs=0.2)
    for down, right in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 4), (4, 4), (64, 128)):
        here, there = x[: size - down, : size - right], x[down:, right:]
        corners = x[: size - down, right:] * x[down:, : size - right]
        assert abs((here * there).sum()) < 4 * size
        if down and right:
            assert abs((here * there * corners).sum()) < 4 * size


@pytest.mark.parametrize("keeps_masks", [False, True])
def test_backward_drops_the_same(keeps_masks: bool) -> None:
    x = ones()
    y = dropout(keeps_masks=keeps_masks)(0, "attention", x)
    with dropout_key_scope(DropoutKey(seed=99)):  # another micro-batch may be current by then
        y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)


@pytest.mark.parametrize(("ranks", "keeps_masks"), [(1, False), (2, False), (4, True)])
def test_ranks_that_share_a_row_have_its_mask(ranks: int, keeps_masks: bool) -> None:
    whole = dropout()(7, "feed_forward", ones())
    parts = []
    for rank in range(ranks):
        drop = dropout(replace(KEY, tensor_rank=rank), keeps_masks=keeps_masks)
        parts.append(drop(7, "feed_forward", ones(TOKENS // ranks)))
    assert torch.equal(torch.cat(parts), whole)


def test_a_rank_that_has_the_whole_row_drops_like_the_others() -> None:
    first, second = (dropout(replace(KEY, tensor_rank=rank))(0, "attention", ones()) for rank in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize("change", [{"seed": 6}, {"step": 4}, {"micro_index": 3}, {"data_rank": 0}], ids=str)
def test_whatever_is_another_computation_has_another_mask(change: dict[str, Any]) -> None:
    assert not torch.equal(dropout()(0, "attention", ones()), dropout(replace(KEY, **change))(0, "attention", ones()))


@pytest.mark.parametrize(("layer", "position"), [(1, "attention"), (0, "feed_forward"), (None, "embedding")])
def test_every_position_of_a_layer_has_a_mask_of_its_own(layer: int | None, position: str) -> None:
    assert not torch.equal(dropout()(0, "attention", ones()), dropout()(layer, position, ones()))


def test_the_micro_batch_is_counted_in_the_global_batch() -> None:
    """The sixth of a rank that has eight is the second of the second of two that have four each."""
    alone = DropoutKey(seed=5, step=3, micro_num=8, micro_index=6)
    assert torch.equal(dropout()(0, "attention", ones()), dropout(alone)(0, "attention", ones()))


def test_the_key_is_that_of_the_innermost_scope() -> None:
    with dropout_key_scope(KEY):
        with dropout_key_scope(DropoutKey()):
            assert current_dropout_key() == DropoutKey()
        assert current_dropout_key() == KEY
    with pytest.raises(UserError, match=r"model.drop_rate: .* without a dropout key"):
        current_dropout_key()
