"""Dropout: what a mask depends on, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.core.parallel.dropout import Dropout, DropoutKey, current_dropout_key, dropout_key_scope
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
