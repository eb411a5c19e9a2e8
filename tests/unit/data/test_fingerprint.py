"""Fingerprints: what changes them, what does not, and which files a later run names."""

from __future__ import annotations

import base64
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.binary_tokens import write_tokens
from internlm.data.fingerprint import LEVELS, FileChanges, Level, file_changes, same_data, sampled_rows
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError
from tests.unit.data.files import write_bin

SAMPLES = [[1, 2, 3], [-4], [5, 6]]


def opened(folder: Path, level: Level = "sampled", min_length: int = 0) -> TokenizedSource:
    return TokenizedSource(str(folder), min_length, 100, level=level)


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in place, and restore size and modification time."""
    before = path.stat()
    content = path.read_bytes()
    assert len(old) == len(new)
    assert old in content
    with path.open("r+b") as stream:
        stream.write(content.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("level", LEVELS)
def test_a_copy_and_a_converted_folder_have_the_same(tmp_path: Path, level: Level) -> None:
    write_bin(tmp_path / "a/en/x.bin", SAMPLES)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    (tmp_path / "c/en").mkdir(parents=True)
    write_tokens(tmp_path / "c/en/x.tokens", map(np.array, SAMPLES), 6)
    first, copied, converted = (opened(tmp_path / name, level).fingerprint() for name in "abc")
    assert first == copied
    assert same_data(first, converted)


@pytest.mark.parametrize(("level", "is_noticed"), [("stat", False), ("sampled", True), ("full", True)])
def test_an_edit_that_keeps_size_and_time_is_noticed(tmp_path: Path, level: Level, is_noticed: bool) -> None:
    path = write_bin(tmp_path / "x.bin", SAMPLES)
    before = opened(tmp_path, level).fingerprint()
    edit(path, b"6", b"7")
    after = opened(tmp_path, level)
    assert after.read(2).tolist() == [5, 7]
    assert same_data(before, after.fingerprint()) is not is_noticed


def test_levels_that_both_have_are_compared(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "x.bin", SAMPLES)
    before = {level: opened(tmp_path, level).fingerprint() for level in LEVELS}
    assert all(same_data(before[a], before[b]) for a in LEVELS for b in LEVELS)
    edit(path, b"6", b"7")
    after = {level: opened(tmp_path, level).fingerprint() for level in LEVELS}
    assert [[same_data(before[a], after[b]) for a in LEVELS] for b in LEVELS] == [
        [True, True, True],
        [True, False, False],
        [True, False, False],
    ]


def test_lengths_names_and_dropped_samples_count(tmp_path: Path) -> None:
    for name, samples in {"a/x": SAMPLES, "b/x": [[1, 2, 3], [-4, 5], [6]], "c/y": SAMPLES}.items():
        write_bin(tmp_path / f"{name}.bin", samples)
    first = opened(tmp_path / "a", "stat").fingerprint()
    assert not same_data(first, opened(tmp_path / "b", "stat").fingerprint())
    assert not same_data(first, opened(tmp_path / "c", "stat").fingerprint())
    assert not same_data(first, opened(tmp_path / "a", "stat", min_length=2).fingerprint())


@pytest.mark.parametrize(
    ("one", "other", "same"), [("random", "random", True), ("random", "other", False), ("random", "stat:12", False)]
)
def test_other_fingerprints_are_compared_as_they_are(one: str, other: str, same: bool) -> None:
    assert same_data(one, other) is same_data(other, one) is same


@given(st.lists(st.integers(0, 3000), max_size=300))
def test_sampled_rows_are_few_and_cover_small_files(lengths: list[int]) -> None:
    rows = list(sampled_rows(np.array(lengths, np.int64)))
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(len(lengths)))
    assert len(rows) == len(lengths) if sum(lengths) <= 16_384 else len(rows) <= 64


def test_any_edit_of_a_small_file_is_noticed(tmp_path: Path) -> None:
    """Three hundred samples of one file, of which each in turn has another token of as many digits."""
    path = write_bin(tmp_path / "x.bin", [[11 + i % 9] * 40 for i in range(300)])
    first, content = opened(tmp_path, "sampled").fingerprint(), path.read_bytes()
    lines = content.splitlines(keepends=True)
    for row in range(0, 300, 7):
        changed = lines[row].replace(b"[1", b"[3", 1)
        path.write_bytes(b"".join([*lines[:row], changed, *lines[row + 1 :]]))
        assert not same_data(first, opened(tmp_path, "sampled").fingerprint())


# -- full: reads are compared with checksums


@pytest.mark.parametrize("begin", [0, 9_000])
def test_flipped_bytes_that_are_valid_tokens_are_found_when_they_are_read(tmp_path: Path, begin: int) -> None:
    path = write_bin(tmp_path / "x.bin", [[11] * 10_000, [22] * 10_000, [33] * 10_000])
    source = opened(tmp_path, "full")
    assert source.read(2, begin, begin + 4).tolist() == [33] * 4
    edit(path, b"33, 33", b"33, 34")
    assert source.read(0, begin, begin + 4).tolist() == [11] * 4
    with pytest.raises(DataError, match=r"x\.bin:3 .*: the content differs from what was indexed, in the 16384 bytes"):
        source.read(2, begin, begin + 4)


# -- names of changed files


def changes(old: TokenizedSource, new: TokenizedSource) -> FileChanges | None:
    return file_changes(old.files(), new.files())


def test_changed_files_are_named(tmp_path: Path) -> None:
    for name in "abc":
        write_bin(tmp_path / f"{name}.bin", SAMPLES)
    before = opened(tmp_path)
    assert changes(before, before) == FileChanges([], [], [])
    edit(tmp_path / "b.bin", b"6", b"7")
    write_bin(tmp_path / "d.bin", SAMPLES)
    (tmp_path / "a.bin").unlink()
    found = changes(before, opened(tmp_path))
    assert found == FileChanges(["b.bin"], ["d.bin"], ["a.bin"])
    assert str(found) == "changed: b.bin; added: d.bin; removed: a.bin"
    assert changes(before, opened(tmp_path, "stat")) is None


@pytest.mark.parametrize("old", ["", "sampled:", "sampled:AAAA", "sampled:*", "x"])
def test_a_list_that_is_damaged_is_not_compared(tmp_path: Path, old: str) -> None:
    write_bin(tmp_path / "a.bin", SAMPLES)
    assert file_changes(old, opened(tmp_path).files()) is None


@pytest.mark.parametrize(("text", "times"), [("\0", 1 << 28), ("0 a\x1b[2K.bin", 1)], ids=["bomb", "forged"])
def test_a_list_that_is_hostile_is_not_compared(tmp_path: Path, text: str, times: int) -> None:
    write_bin(tmp_path / "a.bin", SAMPLES)
    old = base64.b64encode(zlib.compress(text.encode() * times)).decode()
    assert file_changes(f"sampled:{old}", opened(tmp_path).files()) is None
