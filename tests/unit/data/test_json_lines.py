"""JSON lines: pieces of long samples, absurd ids, and any damage of a ``.meta``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data import json_lines
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError
from tests.unit.data.files import write_bin, write_meta

VOCAB = 10**6


def write_line(folder: Path, line: str, length: int) -> Path:
    """One sample of ``length`` tokens between two others."""
    file = write_bin(folder / "x.bin", [[5], [6]])
    first, last = file.read_text().splitlines()
    file.write_text(f"{first}\n{line}\n{last}\n")
    write_meta(file, [(0, 1), (len(first) + 1, length), (len(first) + len(line) + 2, 1)])
    return file


@pytest.fixture(scope="module")
def long_sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizedSource, np.ndarray]:
    """A sample of 50,000 tokens, whose line has 300 KB."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(-VOCAB + 1, VOCAB, 50_000) // 10 ** rng.integers(0, 6, 50_000)
    folder = tmp_path_factory.mktemp("long")
    write_bin(folder / "x.bin", [[1, 2], tokens.tolist(), [3]])
    return TokenizedSource(str(folder), 0, VOCAB), tokens


pieces = st.tuples(st.integers(0, 50_000), st.integers(0, 50_010)).map(sorted)


@given(piece=pieces)
def test_a_piece_of_a_long_sample(long_sample: tuple[TokenizedSource, np.ndarray], piece: list[int]) -> None:
    source, tokens = long_sample
    assert source.read(1, *piece).tolist() == tokens[slice(*piece)].tolist()


def test_ends_of_a_long_sample(long_sample: tuple[TokenizedSource, np.ndarray]) -> None:
    source, tokens = long_sample
    for piece in ((0, None), (0, 0), (0, 1), (49_999, None), (49_999, 50_000), (50_000, None)):
        assert source.read(1, *piece).tolist() == tokens[slice(*piece)].tolist()


def test_a_piece_reads_few_bytes(
    long_sample: tuple[TokenizedSource, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = long_sample
    source.read(1, 0, 10)
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: (sizes.append(size), pread(fd, size, at))[1])
    for begin in range(0, 50_000, 1000):
        source.read(1, begin, begin + 1000)
    assert len(sizes) == 50
    assert max(sizes) <= 8 * 1000 + 2 * json_lines.COMMA_BLOCK


long_texts = st.sampled_from(
    [
        ('{"tokens": [%s], "source": "x"}', None),
        ('{"source": [1, 2], "tokens": [%s]}', None),
        ('  {  "tokens"  :  [  %s  ]  }  ', None),
        ('{"tokens": [%s, 7]}', "expected 30000 tokens as in x.bin.meta, got 30001"),
        ('{"tokens": [%s, 7.5]}', "expected a list of integers as tokens, got float64"),
        ('{"tokens": [%s], "tokens": [1]}', "expected 30000 tokens as in x.bin.meta, got 1"),
        ('{"tokens": [%s', "is not a JSON line"),
    ]
)


@pytest.mark.parametrize("begin", [0, 17_000, 29_999])
@given(text=long_texts)
def test_long_lines_of_any_form(
    tmp_path_factory: pytest.TempPathFactory, begin: int, text: tuple[str, str | None]
) -> None:
    form, said = text
    folder = tmp_path_factory.mktemp("form")
    write_line(folder, form % ", ".join(["12"] * 30_000), 30_000)
    if said is None:
        assert TokenizedSource(str(folder), 0, VOCAB).read(1, begin, begin + 1).tolist() == [12]
        return
    with pytest.raises(DataError, match=r"x\.bin:2 \(sample 1, byte 16\): ") as caught:
        TokenizedSource(str(folder), 0, VOCAB, level="stat").read(1, begin, begin + 1)
    assert said in str(caught.value)


def test_a_bad_token_in_the_middle_of_a_long_sample_is_found_where_it_is_read(tmp_path: Path) -> None:
    texts = ["12"] * 30_000
    texts[17_000] = "1-2"
    write_line(tmp_path, '{{"tokens": [{}]}}'.format(", ".join(texts)), 30_000)
    source = TokenizedSource(str(tmp_path), 0, VOCAB)
    assert source.read(1, 0, 5).tolist() == [12] * 5
    with pytest.raises(DataError, match=r"x\.bin:2 \(sample 1, byte 16\): is not a JSON line"):
        source.read(1, 16_990, 17_010)


@pytest.mark.parametrize("token", [-(2**63), 2**63 - 1, 2**63, -(2**64), 10**400, VOCAB, -VOCAB])
def test_absurd_ids_are_refused(tmp_path: Path, token: int) -> None:
    write_line(tmp_path, json.dumps({"tokens": [1, token]}), 2)
    with pytest.raises(DataError, match=r"x\.bin:2 \(sample 1, byte 16\): "):
        TokenizedSource(str(tmp_path), 0, VOCAB).read(1)


@given(data=st.data())
def test_any_flip_in_the_header_of_a_meta_is_named_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    meta = write_bin(folder / "x.bin", [[1, 2, 3], [4]]).with_name("x.bin.meta")
    content = bytearray(meta.read_bytes())
    at = data.draw(st.integers(0, 127))
    content[at] ^= data.draw(st.integers(1, 255))
    meta.write_bytes(content)
    try:
        source = TokenizedSource(str(folder), 0, VOCAB)
        assert [source.read(sample).tolist() for sample in range(2)] == [[1, 2, 3], [4]]
    except DataError as error:
        assert str(error).startswith(f"{meta}: ")  # noqa: PT017
