"""What is said of tensors of a tensor group that should be one tensor, or shards of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internlm.verify.relations import Relation, explain, is_close, relate

LIMIT = 1e-11
X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LEFT, RIGHT = X.chunk(2, 1)


@pytest.mark.parametrize(
    ("shards", "relation"),
    [
        ([X], Relation.EQUAL),
        ([X, X], Relation.EQUAL),
        ([LEFT, RIGHT], Relation.EQUAL),
        ([X[:5], X[5:]], Relation.EQUAL),  # shards need not be equally large
        ([X * (1 + 1e-13), X], Relation.EQUAL),
        ([NOISE, X - NOISE], Relation.PARTIAL),
        ([X, torch.zeros_like(X)], Relation.PARTIAL),
        ([X, X + 1e-6], Relation.DIFFERENT),
        ([RIGHT, LEFT], Relation.DIFFERENT),
        ([X, X * torch.nan], Relation.DIFFERENT),
        ([X.view(-1), X.view(-1)], Relation.UNKNOWN),
        ([LEFT, LEFT[:3]], Relation.UNKNOWN),
    ],
)
def test_relations(shards: list[Tensor], relation: Relation) -> None:
    assert relate(shards, X, LIMIT) is relation


def test_whole_numbers_are_compared_exactly() -> None:
    ids = torch.arange(6)
    assert relate([ids, ids], ids, LIMIT) is Relation.EQUAL
    assert relate([ids, ids + 1], ids, LIMIT) is Relation.DIFFERENT
    assert relate([ids, ids * 0], ids, LIMIT) is Relation.DIFFERENT  # no sums of ids


def test_what_is_not_finite_everywhere_agrees() -> None:
    bad = X.clone()
    bad[0, 0] = torch.nan
    assert is_close(bad, bad.clone(), LIMIT)
    assert not is_close(X, bad, LIMIT)


def test_rounding_of_what_cancels_is_no_difference() -> None:
    assert not is_close(X * 1e-20, X * 2e-20, LIMIT)
    assert is_close(X * 1e-20, X * 2e-20, LIMIT, floor=1e-3)


def test_half_precision_has_no_relations_by_chance() -> None:
    # Nearer to one another than 100 times the limit, which is that of half precision.
    assert explain([X + NOISE / 4, X - NOISE / 2], X, [("micro-batch 1", X + NOISE / 8)], 1e-2) == ""


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ([NOISE, X - NOISE], "an all-reduce over tensor is missing"),
        ([2 * X, 2 * X], "multiplied by 2, the size of the tensor group, as if what every rank has were summed"),
        ([X / 2, X / 2], "one by the size of the tensor group"),
        ([3 * X, 3 * X], "it is multiplied by 3"),
        ([3 * X, X], "it is multiplied by 3, 1 on the tensor ranks"),
        ([LEFT * 3, RIGHT * 3], "it is multiplied by 3"),
        ([RIGHT, LEFT], "they are sent to the wrong ranks"),
        ([LEFT, LEFT], "the tensor ranks have slices [0, 0] of axis 1"),
        ([X, NOISE], "tensor rank 1 differs, tensor rank 0 agrees"),
        ([NOISE, NOISE], "it is that of micro-batch 1"),
        ([X, X / 0], "not finite on tensor rank 1"),
        ([X + NOISE, X * NOISE], ""),
        ([X[:, :3], NOISE[:, 3:]], ""),
    ],
)
def test_explanations(shards: list[Tensor], words: str) -> None:
    said = explain(shards, X, [("micro-batch 1", NOISE)], LIMIT)
    assert words in said
    assert bool(said) == bool(words)
