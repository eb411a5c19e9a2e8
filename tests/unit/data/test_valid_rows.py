"""Validation rows of all dataset types in shared batches: every token once, whatever the ranks and the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm.config.schema import DataConfig
from internlm.core.parallel.sharding import GroupPosition
from internlm.data import sources
from internlm.data.batch_plan import BatchPlan
from internlm.data.build import build_valid_loaders
from internlm.data.loader import ValidLoader
from internlm.data.packing import PackingLayout, RowShape
from internlm.data.valid_rows import read_together, rows_by_type
from tests.unit.data.files import write_bin

VOCAB = 1000


class ListedSource:
    """Samples of several types in any order; all of their tokens differ."""

    def __init__(self, samples: list[tuple[int, int]], types: int) -> None:
        self.types = [f"type{index}" for index in range(types)]
        self.type_ids = np.array([type_id for type_id, _ in samples], np.int16)
        self.lengths = np.array([length for _, length in samples], np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        start, length = int(self._starts[sample]), int(self.lengths[sample])
        return np.arange(start, start + length)[begin:stop]

    def fingerprint(self) -> str:
        return ""

    def labels(self, type_id: int, longest: int | None) -> list[int]:
        """All labels of a type: each token but the first of its sample."""
        samples = np.flatnonzero(self.type_ids == type_id)
        return [token for sample in samples for token in self.read(int(sample), 1, longest).tolist()]


samples = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20)), min_size=1, max_size=30)


@given(
    samples=samples,
    layout=st.sampled_from(PackingLayout),
    ranks=st.integers(1, 4),
    micro_num=st.integers(1, 3),
)
def test_every_validation_token_is_read_once(
    samples: list[tuple[int, int]], layout: PackingLayout, ranks: int, micro_num: int
) -> None:
    source, shape = ListedSource(samples, types=5), RowShape(seq_len=6, micro_bsz=2, layout=layout)
    plan = BatchPlan(step_rows=micro_num * ranks, data_size=ranks)
    read: dict[int, list[int]] = {type_id: [] for type_id in range(5)}
    batches = set()
    for rank in range(ranks):
        own = [ValidLoader(rows, plan, rank, None, num_worker=0) for rows in rows_by_type(source, shape).values()]
        for index, (batch, labels) in enumerate(read_together(own)):
            batches.add((rank, index))
            for type_id in range(5):
                valid = (labels != -100) & (batch["type_ids"] == type_id)
                read[type_id] += labels[valid].tolist()
    assert {type_id: sorted(tokens) for type_id, tokens in read.items()} == {
        type_id: source.labels(type_id, shape.longest_sample) for type_id in range(5)
    }
    rows = sum(map(len, rows_by_type(source, shape).values()))
    assert batches == {(rank, index) for rank in range(ranks) for index in range(-(-rows // (ranks * micro_num)))}


def loaders(folder: Path, size: int = 1, **keys: Any) -> dict[str, ValidLoader]:
    settings = {"seq_len": 16, "micro_bsz": 1, "micro_num": 4, "total_steps": 1, "num_worker": 0, **keys}
    data = DataConfig(valid_folder=str(folder), **settings)
    return build_valid_loaders(data, VOCAB, seed=1, replica=GroupPosition(0, size))


def test_types_share_batches_and_one_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 types of one short sample take 200 rows, 50 batches of 4, not 200 batches of which three rows are padding."""
    for index in range(200):
        write_bin(tmp_path / f"type{index:03}" / "a.bin", [[index] * 5])
    searches: list[int] = []
    search = np.flatnonzero
    monkeypatch.setattr(sources.np, "flatnonzero", lambda x: searches.append(1) or search(x))
    by_type = loaders(tmp_path)
    assert not searches
    assert len(by_type) == 200
    together = read_together([*by_type.values()])
    assert len(together) == 50
    seen = torch.cat([batch["type_ids"][:, 0] for batch, _ in together])
    assert seen.tolist() == [*range(200)]


def test_each_type_is_bounded_on_its_own(tmp_path: Path) -> None:
    write_bin(tmp_path / "cn" / "a.bin", [[1] * 16] * 30)
    write_bin(tmp_path / "en" / "a.bin", [[2] * 16] * 3)
    together = read_together([*loaders(tmp_path, valid_max_batches=2, valid_micro_num=4).values()])
    rows = torch.cat([batch["input_ids"][:, 0] for batch, _ in together])
    assert rows.tolist() == [1] * 8 + [2] * 3 + [0]


def test_nine_samples_are_enough_for_many_ranks(tmp_path: Path) -> None:
    """With ``min_length = 50``, as in every published config: it bounds the tokens of a sample, not their number."""
    write_bin(tmp_path / "en" / "a.bin", [[1] * 60] * 9)
    ranks = [
        build_valid_loaders(
            DataConfig(valid_folder=str(tmp_path), min_length=50, seq_len=64, micro_bsz=1, micro_num=4, total_steps=1),
            VOCAB,
            seed=1,
            replica=GroupPosition(rank, 16),
        )
        for rank in range(16)
    ]
    labels = [labels for own in ranks for _, labels in read_together([*own.values()])]
    assert sum(int((part != -100).sum()) for part in labels) == 9 * 59
