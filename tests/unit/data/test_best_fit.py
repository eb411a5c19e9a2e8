"""Best-fit packing: whole samples, little padding, and each token once in an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data import best_fit, bins_cache
from internlm.data.best_fit import joined, pack
from internlm.data.blend_rows import BlendRows, Mixture
from internlm.data.packing import PackingLayout, RowShape
from internlm.data.rows import TrainRows, ValidRows
from internlm.data.tokenized_source import TokenizedSource
from tests.unit.data.files import write_bin
from tests.unit.data.test_packing import NONE, SAMPLES, A, B, C, D, ListSource


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_only_samples_that_are_too_long_are_cut(lengths: list[int], seq_len: int, micro_bsz: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "WINDOW", 16)
        bins = pack(np.array(lengths, np.int64), seq_len, seq_len * micro_bsz, seed)
    rows = [bins.pieces(row) for row in range(len(bins))]
    assert [sum(p.stop - p.begin for p in row) for row in rows] == bins.tokens.tolist()
    assert all(0 < tokens <= seq_len * micro_bsz for tokens in bins.tokens)
    pieces = sorted((p.sample, p.begin, p.stop) for row in rows for p in row)
    cuts = range(0, 40, seq_len)
    assert pieces == [(i, cut, min(cut + seq_len, n)) for i, n in enumerate(lengths) for cut in cuts if cut < n]
    assert all(piece.length == lengths[piece.sample] for row in rows for piece in row)


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    bins = pack(lengths, 1024, 1024, seed=0)
    assert lengths.sum() / (len(bins) * 1024) > 0.99
    assert np.sort(bins.tokens)[:2].sum() > 1024


def test_rows_of_parts_are_joined() -> None:
    lengths = np.array([5, 3, 8, 2, 9])
    parts = [pack(lengths, 8, 8, 0, np.array(members)) for members in ([0, 1], [2, 4], [3])]
    both = joined(parts)
    assert [both.pieces(row) for row in range(len(both))] == [p.pieces(r) for p in parts for r in range(len(p))]


def test_a_row() -> None:
    """The rest of a long sample has the next token as the label of its last piece, and attends to itself only."""
    source = ListSource([*range(1, 11)], [21, 22], [31, 32, 33])
    rows = TrainRows(source, RowShape(4, 2, PackingLayout.BEST_FIT), seed=0)
    assert len(rows) == 2
    long, short = sorted((rows[0], rows[1]), key=lambda row: row.input_ids[0])
    assert long.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert long.labels.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert long.cu_seqlens.tolist() == [0, 4, 8]
    assert sorted(short.input_ids.tolist()) == [0, 9, 10, 21, 22, 31, 32, 33]
    assert np.diff(short.cu_seqlens).tolist() == [3, 2, 2, 1]
    assert short.labels.tolist().count(NONE) == 4


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (PackingLayout.BEST_FIT, "2 rows per epoch, 25.00% padding, 0.00% of the samples cut"),
        (PackingLayout.PACKED, "2 rows per epoch, 25.00% padding, 25.00% of the samples cut"),
        (PackingLayout.WINDOWS, "2 rows per epoch, 25.00% padding, 50.00% of the samples cut"),
        (PackingLayout.PADDED, "2 rows per epoch, 25.00% padding, 0.00% of the samples cut"),
    ],
)
def test_the_log_says_what_is_padding_and_what_is_cut(layout: PackingLayout, said: str) -> None:
    """The example of the documentation: samples of 4, 7, 8 and 5 tokens."""
    assert TrainRows(SAMPLES, RowShape(8, 2, layout), seed=0).description == said


def test_the_example_of_the_documentation() -> None:
    rows = [ValidRows(SAMPLES, RowShape(8, 2, PackingLayout.BEST_FIT))[index] for index in range(2)]
    assert [row.input_ids.tolist() for row in rows] == [[*C, *B, 0], [*D, *A, *[0] * 7]]
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, 8, 15, 16], [0, 5, 9, 16]]


def test_epochs_shuffle_the_rows() -> None:
    source = ListSource(*([token] * 3 for token in range(1, 40)))
    rows = TrainRows(source, RowShape(4, 1, PackingLayout.BEST_FIT), seed=0)
    epochs = [[int(rows[epoch * 39 + row].input_ids[0]) for row in range(39)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(1, 40)]
    assert epochs[0] != epochs[1]


def test_a_packing_is_made_once_and_anew_when_what_it_depends_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for name in ("code", "en"):
        write_bin(tmp_path / name / "a.bin", [[1 + i % 50] * int(random.integers(2, 20)) for i in range(40)])
    packed: list[tuple[int, int]] = []

    def counted(lengths: np.ndarray, seq_len: int, packed_length: int, seed: int, members: np.ndarray | None) -> object:
        packed.append((seq_len, 0 if members is None else len(members)))
        return pack(lengths, seq_len, packed_length, seed, members)

    monkeypatch.setattr(bins_cache, "pack", counted)

    def rows(seq_len: int = 16, seed: int = 0, weights: dict[str, float] | None = None) -> list[list[int]]:
        source, shape = TokenizedSource(str(tmp_path), 0, 100), RowShape(seq_len, 2, PackingLayout.BEST_FIT)
        mixture = Mixture(((0, weights or {}),))
        made = BlendRows(source, shape, seed, mixture, 9) if weights else TrainRows(source, shape, seed)
        return [made[index].input_ids.tolist() for index in range(12)]

    mixture = {"en": 1.0, "code": 2.0}
    calls: list[dict[str, Any]] = [{}, {"seq_len": 8}, {"seed": 1}, {"weights": mixture}, {"weights": {"en": 1.0}}]
    expected = [rows(**call) for call in calls]
    assert not (tmp_path / ".internlm_index.rows").exists()  # too few samples
    monkeypatch.setattr(bins_cache, "LEAST_SAMPLES", 1)
    packed.clear()
    assert [[rows(**call), rows(**call)] for call in calls] == [[of_call] * 2 for of_call in expected]
    assert packed == [(16, 0), (8, 0), (16, 0), (16, 40), (16, 40), (16, 40)]
    write_bin(tmp_path / "en" / "b.bin", [[7] * 5])
    assert rows(weights={"en": 1.0}) != expected[-1]
    assert packed[-1] == (16, 41)
