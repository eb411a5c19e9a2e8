"""Packing: the worked example of the documentation, and properties that hold for any data."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.order import shuffled
from internlm.data.packing import (
    IGNORED,
    PackingLayout,
    Row,
    RowShape,
    make_row,
)
from internlm.data.rows import TrainRows, ValidRows, items_of
from internlm.data.sources import INPUT_ONLY_ZERO
from internlm.data.tokenized_source import TokenizedSource
from tests.unit.data.files import write_bin


class ListSource:
    """Samples given as lists of token ids."""

    def __init__(self, *samples: list[int]) -> None:
        self._samples = [np.array(sample, np.int64) for sample in samples]
        self.types = ["x", "y"]
        self.lengths = np.array([len(sample) for sample in samples], np.int64)
        self.type_ids = np.arange(len(samples)) % 2

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        return self._samples[sample][begin:stop]

    def fingerprint(self) -> str:
        return ""


A, B, C, D = [10, 11, 12, 13], list(range(20, 27)), list(range(30, 38)), list(range(40, 45))
SAMPLES = ListSource(A, B, C, D)
NONE = IGNORED


def row_of(
    layout: PackingLayout, number: int, source: ListSource = SAMPLES, seq_len: int = 8, micro_bsz: int = 2
) -> Row:
    return ValidRows(source, RowShape(seq_len, micro_bsz, layout))[number]


def test_packed_row_0() -> None:
    row = row_of(PackingLayout.PACKED, 0)
    assert row.input_ids.tolist() == [*A, *B, *C[:5]]
    assert row.labels.tolist() == [11, 12, 13, NONE, *B[1:], NONE, 31, 32, 33, 34, 35]
    assert row.cu_seqlens.tolist() == [0, 4, 11, 16]
    assert row.indexes.tolist() == [*range(4), *range(7), *range(5)]
    assert row.type_ids.tolist() == [0] * 4 + [1] * 7 + [0] * 5


def test_packed_row_1() -> None:
    row = row_of(PackingLayout.PACKED, 1)
    assert row.input_ids.tolist() == [*C[5:], *D, *[0] * 8]
    assert row.labels.tolist() == [36, 37, NONE, 41, 42, 43, 44, NONE, *[NONE] * 8]
    assert row.cu_seqlens.tolist() == [0, 3, 8, 16]
    assert row.indexes.tolist() == [*range(3), *range(5), *range(8)]


@pytest.mark.parametrize("number", [0, 1])
def test_windows_are_the_packed_stream_cut_at_seq_len(number: int) -> None:
    row, packed = row_of(PackingLayout.WINDOWS, number), row_of(PackingLayout.PACKED, number)
    assert row.cu_seqlens.tolist() == [0, 8, 16]
    assert row.indexes.tolist() == [*range(8), *range(8)]
    assert row.input_ids.tolist() == packed.input_ids.tolist()
    assert row.labels.tolist() == packed.labels.tolist()


def test_padded_row_0() -> None:
    row = row_of(PackingLayout.PADDED, 0)
    assert row.input_ids.reshape(2, 8).tolist() == [[*A, 0, 0, 0, 0], [*B, 0]]
    assert row.labels.reshape(2, 8).tolist() == [[11, 12, 13, *[NONE] * 5], [*B[1:], NONE, NONE]]
    assert row.indexes.reshape(2, 8).tolist() == [list(range(8))] * 2


def test_padded_samples_are_cut_off_at_seq_len() -> None:
    row = row_of(PackingLayout.PADDED, 0, ListSource(list(range(1, 12)), [7, 8]), seq_len=4)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 7, 8, 0, 0]
    assert row.labels.tolist() == [2, 3, 4, NONE, 8, NONE, NONE, NONE]


def test_a_sample_over_seq_len_is_split_into_sequences() -> None:
    row = row_of(PackingLayout.PACKED, 0, ListSource([9, 9], list(range(1, 20))), seq_len=4, micro_bsz=3)
    assert row.cu_seqlens.tolist() == [0, 2, 6, 10, 12]
    assert row.indexes.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert row.labels.tolist() == [9, NONE, *range(2, 12)]


@pytest.mark.parametrize("layout", PackingLayout)
def test_a_negative_id_is_an_input_but_no_label(layout: PackingLayout) -> None:
    row = row_of(layout, 0, ListSource([5, -6, -7, 0, 8]), micro_bsz=1)
    assert row.input_ids.tolist() == [5, 6, 7, 0, 8, 0, 0, 0]
    assert row.labels.tolist() == [NONE, NONE, 0, 8, NONE, NONE, NONE, NONE]


@pytest.mark.parametrize("layout", PackingLayout)
def test_token_0_as_an_input_only(layout: PackingLayout, tmp_path: Path) -> None:
    write_bin(tmp_path / "x.bin", [[INPUT_ONLY_ZERO, INPUT_ONLY_ZERO, 8, 0, INPUT_ONLY_ZERO, 9]])
    row = row_of(layout, 0, TokenizedSource(str(tmp_path), 0, 10), micro_bsz=1)
    assert row.input_ids.tolist() == [0, 0, 8, 0, 0, 9, 0, 0]
    assert row.labels.tolist() == [NONE, 8, 0, NONE, 9, NONE, NONE, NONE]


@pytest.mark.parametrize("layout", [PackingLayout.PACKED, PackingLayout.WINDOWS])
def test_a_negative_id_of_the_next_row_is_no_label(layout: PackingLayout) -> None:
    row = row_of(layout, 0, ListSource([1, 2, 3, 4, -5, 6]), seq_len=4, micro_bsz=1)
    assert row.input_ids.tolist() == [1, 2, 3, 4]
    assert row.labels.tolist() == [2, 3, 4, NONE]


@pytest.mark.parametrize("layout", PackingLayout)
def test_beyond_the_last_row_there_are_pads(layout: PackingLayout) -> None:
    row = row_of(layout, 2)
    assert set(row.labels.tolist()) == {NONE}
    assert row.cu_seqlens.tolist() == [0, 8, 16]


# -- for any data

lengths_of_samples = st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(any)
shapes = st.builds(RowShape, st.integers(1, 9), st.integers(1, 4), st.sampled_from(PackingLayout))
streams = st.sampled_from([PackingLayout.PACKED, PackingLayout.WINDOWS])


def numbered(lengths: list[int]) -> ListSource:
    """Samples whose tokens are all different: sample s holds 100 s + 1, 100 s + 2, ..."""
    return ListSource(*([100 * s + 1 + i for i in range(length)] for s, length in enumerate(lengths)))


SHORT, LINES = numbered([5, 2]), RowShape(4, 1, PackingLayout.PACKED)


@given(lengths_of_samples, shapes, st.integers(0, 2))
def test_an_epoch_holds_each_token_once_with_the_next_as_label(lengths: list[int], shape: RowShape, epoch: int) -> None:
    source = numbered(lengths)
    rows = TrainRows(source, shape, seed=1)
    of_epoch = [rows[epoch * rows.per_epoch + i] for i in range(rows.per_epoch)]
    input_ids = np.concatenate([row.input_ids for row in of_epoch])
    labels = np.concatenate([row.labels for row in of_epoch])
    used = [min(n, shape.seq_len) if shape.layout is PackingLayout.PADDED else n for n in lengths]
    expected = [100 * s + 1 + i for s, length in enumerate(used) for i in range(length)]
    assert sorted(input_ids[input_ids > 0].tolist()) == expected
    last = {100 * s + length for s, length in enumerate(used)}
    for token, label in zip(input_ids.tolist(), labels.tolist(), strict=True):
        assert label == (IGNORED if token == 0 or token in last else token + 1)


@given(lengths_of_samples, shapes)
def test_windows_are_at_most_seq_len_and_positions_count_within_them(lengths: list[int], shape: RowShape) -> None:
    source = numbered(lengths)
    items = items_of(source, shape, 1)
    epoch = items.in_order(shuffled(items.lengths, shape.longest_sample, seed=1, index=0))
    for number in range(items.count_rows(shape) + (shape.layout is not PackingLayout.BEST_FIT)):
        row = make_row(source, epoch, shape, number)
        sizes = np.diff(row.cu_seqlens)
        assert row.cu_seqlens[0] == 0
        assert row.cu_seqlens[-1] == shape.packed_length
        assert row.cu_seqlens.dtype == np.int32
        assert 1 <= sizes.min() <= sizes.max() <= shape.seq_len
        assert row.indexes.tolist() == [i for size in sizes for i in range(size)]


@given(lengths_of_samples, shapes)
def test_packed_attention_never_crosses_a_sample(lengths: list[int], shape: RowShape) -> None:
    shape = RowShape(shape.seq_len, shape.micro_bsz, PackingLayout.PACKED)
    rows = TrainRows(numbered(lengths), shape, seed=1)
    for number in range(rows.per_epoch):
        row = rows[number]
        for begin, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            steps = np.diff(row.input_ids[begin:end])
            assert (steps == 1).all() or (row.input_ids[begin:end] == 0).all()


@pytest.mark.parametrize("rows", [TrainRows(SHORT, LINES, seed=1), ValidRows(SHORT, LINES)], ids=["train", "valid"])
def test_rows_are_iterated_once_and_counted_from_0(rows: TrainRows | ValidRows) -> None:
    tokens = [row.input_ids.tolist() for row in itertools.islice(rows, 10)]
    assert tokens == [rows[index].input_ids.tolist() for index in range(2)]
    with pytest.raises(IndexError, match=r"^rows are counted from 0, got index -1$"):
        rows[-1]


@pytest.mark.parametrize("layout", PackingLayout)
def test_a_row_of_a_million_tokens_takes_memory_in_proportion_to_its_length(layout: PackingLayout) -> None:
    def peak(size: int) -> float:
        rows = TrainRows(Endless(), RowShape(size, 1, layout), seed=0)
        tracemalloc.start()
        rows[1]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / size

    assert peak(1 << 20) < 1.2 * peak(1 << 16) < 120


class Endless:
    """Two long samples."""

    types: ClassVar[list[str]] = ["x"]
    lengths = np.array([5_000_000, 5_000_000])
    type_ids = np.zeros(2, np.int16)

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        return np.arange(begin, self.lengths[sample] if stop is None else stop)

    def fingerprint(self) -> str:
        return ""
