"""Provenance of rows: the bytes of the files that are named hold the tokens of the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.packing import PackingLayout, RowShape
from internlm.data.provenance import Origin, TracedSpan
from internlm.data.rows import TrainRows
from internlm.data.sources import RandomSource
from internlm.data.tokenized_source import TokenizedSource
from tests.unit.data.files import write_bin


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two types, in three files, with short samples that are dropped and tokens that are inputs only."""
    root = tmp_path_factory.mktemp("traced")
    for index, name in enumerate(("en/a", "en/deep/b", "code/a")):
        samples = [[(i + j * 7 + index) % 90 * (-1 if j % 3 == 1 else 1) for j in range(i % 11)] for i in range(60)]
        write_bin(root / f"{name}.bin", samples)
    return root


def tokens_at(origin: Origin) -> list[int]:
    """Read a sample from the bytes of its file."""
    assert origin.byte is not None
    assert origin.bytes is not None
    content = Path(origin.file).read_bytes()
    line = content[origin.byte : origin.byte + origin.bytes]
    assert line == content.splitlines(keepends=True)[origin.row]
    return json.loads(line)["tokens"]


@pytest.mark.parametrize("layout", PackingLayout)
@pytest.mark.parametrize("min_length", [0, 4])
def test_the_tokens_of_a_row_are_in_the_files(folder: Path, layout: PackingLayout, min_length: int) -> None:
    source = TokenizedSource(str(folder), min_length, vocab_size=100)
    rows = TrainRows(source, RowShape(8, 3, layout), seed=5)
    for index in (*range(len(rows)), 5 * len(rows) + 1):
        row, ids, types = rows[index], np.zeros(24, np.int64), np.zeros(24, np.int64)
        for span in rows.trace(index):
            tokens = np.abs(tokens_at(span.origin)[span.begin : span.stop])
            ids[span.at : span.at + len(tokens)] = tokens
            types[span.at : span.at + len(tokens)] = source.types.index(span.type_name)
            assert span.type_name == Path(span.origin.file).relative_to(folder).parts[0]
        assert ids.tolist() == row.input_ids.tolist()
        assert types.tolist() == row.type_ids.tolist()


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 20), st.integers(1, 8), st.integers(0, 7))
def test_parts_of_a_row_have_all_of_a_span(at: int, size: int, begin: int, parts: int, extra: int) -> None:
    length = (at + size) // parts + 1 + extra
    span = TracedSpan(at, begin, begin + size, 100, "en", Origin("a.bin", 0))
    found: list[Any] = []
    for part in range(parts):
        clipped = span.clipped(part * length, (part + 1) * length)
        if clipped is not None:
            start = part * length + clipped.at
            assert 0 <= clipped.at < length
            found += zip(range(start, start + length), range(clipped.begin, clipped.stop), strict=False)
    assert found == list(zip(range(at, at + size), range(begin, begin + size), strict=True))


def test_random_samples_have_no_file() -> None:
    rows = TrainRows(RandomSource(1, 50, 8, False), RowShape(8, 2, PackingLayout.PACKED), seed=1)
    source = rows.source
    for span in rows.trace(3):
        assert span.origin == Origin("", span.origin.row)
        tokens = source.read(span.origin.row, span.begin, span.stop)
        assert rows[3].input_ids[span.at : span.at + len(tokens)].tolist() == tokens.tolist()
