"""Binary token files: any samples, any damage, and beside JSON lines."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.binary_tokens import HEADER, MAGIC, write_tokens
from internlm.data.sources import INPUT_ONLY_ZERO
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError
from tests.unit.data.files import write_bin

VOCAB = 1 << 32


def write(path: Path, samples: list[list[int]], largest: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    largest = max([largest, *(abs(token) % 2**31 for sample in samples for token in sample)])
    write_tokens(path, (np.array(sample, np.int64) for sample in samples), largest)
    return path


ids = st.one_of(st.integers(-300, 300), st.integers(-(2**31) + 1, 2**31 - 1), st.just(INPUT_ONLY_ZERO))
lists = st.lists(st.lists(ids, max_size=20), min_size=1, max_size=12).filter(lambda s: any(len(t) > 1 for t in s))


@given(samples=lists, data=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, samples: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("x")
    write(folder / "x.tokens", samples)
    source = TokenizedSource(str(folder), 0, VOCAB)
    assert source.lengths.tolist() == [len(sample) for sample in samples]
    for number, sample in enumerate(samples):
        begin, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(sample))] * 2)))
        assert source.read(number).tolist() == sample
        assert source.read(number, begin, stop).tolist() == sample[begin:stop]


def test_sizes(tmp_path: Path) -> None:
    sizes = {
        "two bytes": write(tmp_path / "a.tokens", [[1] * 80], largest=65_535),
        "four bytes": write(tmp_path / "b.tokens", [[1] * 80], largest=65_536),
        "with a mask": write(tmp_path / "c.tokens", [[-1] * 80]),
    }
    assert {name: path.stat().st_size - HEADER.size - 4 for name, path in sizes.items()} == {
        "two bytes": 160,
        "four bytes": 320,
        "with a mask": 170,
    }


@given(data=st.data())
def test_any_damage_is_named_or_other_tokens(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = write(folder / "x.tokens", [[1, -2, 3], [4], [], [5, 6]])
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    if HEADER.size <= at < HEADER.size + 6 * 2 + 1:  # ids and mask: only the level "full" has a checksum of them
        TokenizedSource(str(folder), 0, VOCAB)
        return
    with pytest.raises(DataError) as caught:
        TokenizedSource(str(folder), 0, VOCAB)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("kept", [0, 8, 63, 64, 70, 90])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "x.tokens", [[1, 2, 3], [4], [5, 6]])
    os.truncate(path, kept)
    with pytest.raises(DataError, match=rf"{path}: "):
        TokenizedSource(str(tmp_path), 0, VOCAB)


def test_a_hostile_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    path.write_bytes(HEADER.pack(MAGIC, 4, 0, 0, 1 << 62, 1 << 63, 0))
    with pytest.raises(DataError, match=r"is damaged: 4611686018427387904 samples and .* the file has 64"):
        TokenizedSource(str(tmp_path), 0, VOCAB)
    path.write_bytes(struct.pack("<8sHHI48x", MAGIC, 3, 0, 0))
    with pytest.raises(DataError, match="3 bytes per id"):
        TokenizedSource(str(tmp_path), 0, VOCAB)


def test_truncation_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tokens", [[1] * 3000, [2] * 3000])
    source = TokenizedSource(str(tmp_path), 0, VOCAB)
    assert source.read(1).tolist() == [2] * 3000
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"x\.tokens:2 \(sample 1, byte 6064\): the file has changed"):
        source.read(1)


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    write_bin(tmp_path / "en/b.bin", [[1, 2], [-3]])
    write(tmp_path / "en/a.tokens", [[4, 5]])
    source = TokenizedSource(str(tmp_path), 0, VOCAB)
    assert [source.read(sample).tolist() for sample in range(3)] == [[4, 5], [1, 2], [-3]]
    write(tmp_path / "en/b.tokens", [[1, 2], [-3]])
    with pytest.raises(DataError, match=r"b\.(bin|tokens) and b\.(bin|tokens) are beside each other"):
        TokenizedSource(str(tmp_path), 0, VOCAB)


@pytest.mark.parametrize("tokens", [[-(2**63)], [2**32], [70_000]])
def test_an_id_beyond_the_largest_is_not_written(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="beyond 65535"):
        write_tokens(tmp_path / "x.tokens", [np.array(tokens)], 65_535)
