"""Rows that ranks split along the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm.config.schema import DataConfig
from internlm.core.parallel.sharding import GroupPosition
from internlm.data.build import build_train_loader, build_valid_loaders
from internlm.data.loader import Batch, collate, split_rows
from internlm.data.packing import PackingLayout, RowShape
from internlm.data.rows import ValidRows
from tests.unit.data.test_packing import NONE, SAMPLES, A, B, C

FIELDS = ("input_ids", "indexes", "type_ids")


def batch_of(layout: PackingLayout) -> Batch:
    """Two rows of two sequences of eight tokens."""
    shape = RowShape(8, 2, layout)
    rows = ValidRows(SAMPLES, shape)
    return collate([rows[0], rows[1]], shape, 2)


def parts_of(batch: Batch, size: int) -> list[Batch]:
    return [split_rows(batch, GroupPosition(rank, size)) for rank in range(size)]


def test_the_worked_example() -> None:
    """Samples of 4, 7, 8 and 5 tokens, on two ranks: each has eight tokens of the sixteen of row 0."""
    first, second = parts_of(batch_of(PackingLayout.PACKED), 2)
    assert first[0]["input_ids"][0].tolist() == [*A, *B[:4]]
    assert first[0]["indexes"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert first[0]["type_ids"][0].tolist() == [0] * 4 + [1] * 4
    assert first[1][0].tolist() == [11, 12, 13, NONE, 21, 22, 23, 24]
    assert second[0]["input_ids"][0].tolist() == [*B[4:], *C[:5]]
    assert second[0]["indexes"][0].tolist() == [4, 5, 6, 0, 1, 2, 3, 4]
    assert second[0]["type_ids"][0].tolist() == [1] * 3 + [0] * 5
    assert second[1][0].tolist() == [25, 26, NONE, 31, 32, 33, 34, 35]
    for batch, _ in (first, second):
        assert [bounds.tolist() for bounds in batch["cu_seqlens"]] == [[0, 4, 11, 16], [0, 3, 8, 16]]


@pytest.mark.parametrize("layout", PackingLayout)
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_parts_side_by_side_are_the_whole(layout: PackingLayout, size: int) -> None:
    batch, labels = batch_of(layout)
    parts = parts_of((batch, labels), size)
    for name in FIELDS:
        whole = torch.cat([part[name] for part, _ in parts], 1)
        assert torch.equal(whole, batch[name].view(2, 16)), name
        assert parts[0][0][name].shape == (2, 16 // size)
    assert torch.equal(torch.cat([own for _, own in parts], 1), labels.view(2, 16))


@pytest.mark.parametrize(
    ("layout", "bounds"),
    [
        (PackingLayout.PACKED, [[0, 4, 11, 16], [0, 3, 8, 16]]),
        (PackingLayout.WINDOWS, [[0, 8, 16], [0, 8, 16]]),
        (PackingLayout.PADDED, [[0, 8, 16], [0, 8, 16]]),  # padded sequences become one packed row
    ],
)
def test_sequence_boundaries_are_those_of_whole_rows(layout: PackingLayout, bounds: list[list[int]]) -> None:
    for part, _ in parts_of(batch_of(layout), 4):
        assert [cu_seqlens.tolist() for cu_seqlens in part["cu_seqlens"]] == bounds
        assert {cu_seqlens.dtype for cu_seqlens in part["cu_seqlens"]} == {torch.int32}
        assert set(part) == {*FIELDS, "cu_seqlens"}


@pytest.mark.parametrize("layout", PackingLayout)
def test_a_rank_that_shares_with_nobody_has_the_batch_as_it_is(layout: PackingLayout) -> None:
    batch = batch_of(layout)
    assert split_rows(batch, GroupPosition()) is batch


SIZES: dict[str, Any] = {"seq_len": 16, "micro_bsz": 2, "micro_num": 3, "total_steps": 20, "num_worker": 0}


@pytest.mark.parametrize("settings", [{}, {"pack_sample_into_one": True}, {"use_packed_dataset": False}], ids=str)
def test_loaders_give_each_rank_its_part(settings: dict[str, Any]) -> None:
    """Training and validation alike; of the samples of the data-parallel rank that it is."""
    data = DataConfig(**SIZES, **settings)
    for part in (GroupPosition(0, 2), GroupPosition(1, 2)):
        given = {"vocab_size": 50, "seed": 7, "replica": GroupPosition(1, 2)}
        pairs = [(build_train_loader(data, **given, sequence_shard=part)[0], build_train_loader(data, **given)[0])]
        split, whole = build_valid_loaders(data, **given, sequence_shard=part), build_valid_loaders(data, **given)
        pairs += [(split[name], whole[name]) for name in whole]
        assert len(pairs) == 2
        for loader, reference in pairs:
            (batch, labels), expected = loader.read(1), split_rows(reference.read(1), part)
            assert torch.equal(labels, expected[1])
            assert labels.shape == (3, 16)
            assert all(torch.equal(batch[name], expected[0][name]) for name in FIELDS)
            assert all(a.equal(b) for a, b in zip(batch["cu_seqlens"], expected[0]["cu_seqlens"], strict=True))
