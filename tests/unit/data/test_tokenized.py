"""Tokenized files: types, order, the cached index, and every way in which a file can be damaged."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from internlm.data.index import CACHE_NAME
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError
from tests.unit.data.files import write_bin, write_meta

VOCAB = 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five samples of three types."""
    write_bin(tmp_path / "en/b.bin", [[1, 2, 3], [4]])
    write_bin(tmp_path / "en/a/z.bin", [[5, -6]])
    write_bin(tmp_path / "cn/x.bin", [[7, 8, 9, 10]])
    write_bin(tmp_path / "top.bin", [[]])
    return tmp_path


def opened(folder: Path, min_length: int = 0, cache: Path | None = None) -> TokenizedSource:
    return TokenizedSource(str(folder), min_length, VOCAB, str(cache) if cache else None)


def all_samples(source: TokenizedSource) -> list[list[int]]:
    return [source.read(sample).tolist() for sample in range(len(source.lengths))]


def test_samples_lie_in_the_order_of_the_names(folder: Path) -> None:
    source = opened(folder)
    assert all_samples(source) == [[7, 8, 9, 10], [5, -6], [1, 2, 3], [4], []]
    assert source.lengths.tolist() == [4, 2, 3, 1, 0]
    assert source.types == ["cn", "default", "en"]
    assert [source.types[i] for i in source.type_ids] == ["cn", "en", "en", "en", "default"]


def test_samples_of_few_tokens_are_dropped_and_counted(folder: Path) -> None:
    write_bin(folder / "en/b.bin", [[1], [1, 2, 3], [4], [5, 6]])
    source = opened(folder, min_length=2)
    assert all_samples(source) == [[7, 8, 9, 10], [5, -6], [1, 2, 3], [5, 6]]
    assert (source.types, source.emptied_types, source.dropped) == (["cn", "en"], ["default"], 3)
    again = opened(folder, min_length=2)  # from the kept index
    assert (again.dropped, again.fingerprint()) == (3, source.fingerprint())
    assert opened(folder).fingerprint() != source.fingerprint()


def test_a_damaged_line_is_counted_with_the_dropped_ones(tmp_path: Path) -> None:
    write_bin(tmp_path / "x.bin", [[1, 2], [9], [3, 4], [5, VOCAB]])
    with pytest.raises(DataError, match=r"x\.bin:4 \(sample 3, byte 54\): contains token 100"):
        all_samples(opened(tmp_path, min_length=2))


def test_a_type_name_with_control_characters_is_refused(tmp_path: Path) -> None:
    write_bin(tmp_path / "e\nn" / "x.bin", [[1, 2]])
    assert "the folder 'e\\nn', which names a dataset type, has control characters in its name. Rename it" in error_of(
        tmp_path
    )


def test_a_file_name_with_control_characters_is_refused(tmp_path: Path) -> None:
    write_bin(tmp_path / "en" / "x\x1b[2K.bin", [[1, 2]])
    assert "the path 'en/x\\x1b[2K.bin' has control characters in its name. Rename it" in error_of(tmp_path)


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "en").symlink_to(folder / "en")
    (elsewhere / "circle").symlink_to(elsewhere)
    assert all_samples(opened(elsewhere)) == [[5, -6], [1, 2, 3], [4]]


def test_what_is_left_out_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    samples = all_samples(opened(folder))
    assert caplog.messages == []  # a cached index, and the files beside others, are expected
    os.mkfifo(folder / "cn" / "pipe.bin")
    (folder / "cn" / "gone.bin").symlink_to(folder / "nowhere")
    (folder / "en" / "a" / "circle").symlink_to(folder / "en")
    (folder / "lonely.bin.meta").write_bytes(b"")
    for number in range(6):
        (folder / "en" / f"{number}.jsonl.gz").write_bytes(b"")
    assert all_samples(opened(folder)) == samples
    others = ", ".join(f"'en/{number}.jsonl.gz'" for number in range(5))
    (line,) = caplog.messages
    start, *parts = line.split("; ")
    assert sorted([start.removeprefix(f"{folder}: left out: "), *parts]) == [
        "1 linked to a folder around it ('en/a/circle')",
        "2 that is no regular file ('cn/gone.bin', 'cn/pipe.bin')",
        f"7 with another suffix ({others}, ...)",
    ]
    caplog.clear()
    assert opened(folder / "en/b")
    assert caplog.messages == []


def test_one_file_by_its_path_without_the_suffix(folder: Path) -> None:
    source = opened(folder / "en/b")
    assert all_samples(source) == [[1, 2, 3], [4]]
    assert all_samples(opened(folder)) == [[7, 8, 9, 10], [5, -6], [1, 2, 3], [4], []]
    assert opened(folder / "en/b").fingerprint() == source.fingerprint()


# -- the kept index


def test_the_index_is_kept_and_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder)
    monkeypatch.setattr("internlm.data.index._build", None)  # fails where the index is made again
    second = opened(folder)
    assert all_samples(second) == all_samples(first)
    assert second.fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    "harm",
    [
        lambda cache: cache.write_bytes(b""),
        lambda cache: cache.write_bytes(cache.read_bytes()[:-8]),
        lambda cache: cache.write_bytes(cache.read_bytes() + b"\x07"),
        lambda cache: cache.write_bytes(pickle.dumps([1, 2, 3])),
        lambda cache: np.save(cache.open("wb"), np.zeros((3, 6), np.int64)),
    ],
    ids=["empty", "truncated", "extended", "pickle", "foreign"],
)
def test_a_damaged_index_is_made_again(folder: Path, harm: Callable[[Path], object]) -> None:
    expected = all_samples(opened(folder))
    good = (folder / CACHE_NAME).read_bytes()
    harm(folder / CACHE_NAME)
    assert all_samples(opened(folder)) == expected
    assert (folder / CACHE_NAME).read_bytes() == good


def test_a_stale_index_is_made_again(folder: Path) -> None:
    before = opened(folder).fingerprint()
    write_bin(folder / "en/b.bin", [[1, 2, 3], [4], [11]])
    source = opened(folder)
    assert all_samples(source)[2:] == [[1, 2, 3], [4], [11], []]
    assert source.fingerprint() != before


def test_the_index_may_lie_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("shm") / "metacache"
    source = opened(folder, cache=cache)
    assert len(list(cache.iterdir())) == 1
    assert not (folder / CACHE_NAME).exists()
    assert all_samples(opened(folder, cache=cache)) == all_samples(source)


def test_an_index_that_cant_be_kept_is_done_without(folder: Path) -> None:
    (folder / "taken").write_text("a file where a folder should be")
    assert len(all_samples(opened(folder, cache=folder / "taken/metacache"))) == 5


def test_several_may_make_the_index_at_once(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        sources = list(pool.map(lambda _: opened(folder), range(16)))
    assert all(all_samples(source) == all_samples(sources[0]) for source in sources)
    assert [path.name for path in folder.glob(".*")] == [CACHE_NAME]


def test_a_copy_has_the_same_fingerprint(tmp_path: Path) -> None:
    samples = [[1, 2, 3], [4]]
    for name in ("one", "two"):
        os.utime(write_bin(tmp_path / name / "en/x.bin", samples), ns=(len(name), 0))
    write_bin(tmp_path / "other/en/x.bin", [[1, 2], [3, 4]])
    one, two, other = (opened(tmp_path / name).fingerprint() for name in ("one", "two", "other"))
    assert one == two != other


# -- bad input


def error_of(folder: Path, min_length: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        all_samples(opened(folder, min_length))
    return str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none").startswith(f"{tmp_path}/none: no such folder. Set data.train_folder or ")


def test_no_bin_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert "contains no .bin or .tokens file" in error_of(tmp_path)


def test_all_missing_metas_are_named(folder: Path) -> None:
    for name in ("en/b.bin.meta", "cn/x.bin.meta"):
        (folder / name).unlink()
    said = error_of(folder).splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"{folder}/cn/x.bin.meta: is missing beside x.bin")


def test_all_samples_filtered_out(folder: Path) -> None:
    said = error_of(folder, min_length=5)
    assert "all samples have fewer tokens than data.min_length = 5 (the longest: 4)" in said
    assert said.endswith("Set data.min_length to at most 4")


def test_nothing_but_empty_samples(tmp_path: Path) -> None:
    write_bin(tmp_path / "x.bin", [[], []])
    assert "contain no sample of two or more tokens" in error_of(tmp_path)


def test_nothing_but_samples_of_one_token(tmp_path: Path) -> None:
    write_bin(tmp_path / "x.bin", [[7], [8]])
    assert "its 1 token files contain only samples of one token, which have no next token" in error_of(tmp_path)


#: Two lines of 22 and 16 bytes.
TWO = [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(0, 3), (999, 1)], "sample 1 at byte 999 cannot have 1 tokens in -961 bytes"),
        ([(0, 3), (22, 30)], "sample 1 at byte 22 cannot have 30 tokens in 16 bytes"),
        ([(0, 3), (22, 2**62)], "sample 1 at byte 22 cannot have 4611686018427387904 tokens in 16 bytes"),
        ([(22, 1), (0, 3)], "sample 0 at byte 22 cannot have 1 tokens in -22 bytes"),
        ([(0, 3), (22, -1)], "sample 1 at byte 22 cannot have -1 tokens in 16 bytes"),
        ([(-1, 3), (22, 1)], "sample 0 at byte -1 cannot have 3 tokens in 23 bytes"),
        ([(0, 3), (38, 0)], "sample 1 at byte 38 cannot have 0 tokens in 0 bytes"),
        ([(0, 3)], "the last sample (sample 0) does not end where the file ends"),
        ([], "it lists no samples, but the file is not empty"),
    ],
)
def test_meta_and_bin_disagree(tmp_path: Path, rows: list[tuple[int, int]], said: str) -> None:
    file = write_bin(tmp_path / "x.bin", TWO)
    write_meta(file, rows)
    assert error_of(tmp_path).startswith(f"{file}.meta: does not match x.bin (38 bytes): {said}. Recreate the")


def test_a_bin_with_far_more_bytes_than_its_tokens_need(tmp_path: Path) -> None:
    file = write_bin(tmp_path / "x.bin", TWO)
    os.truncate(file, 10**10)  # a hole, which nobody should read
    assert "sample 1 at byte 22 cannot have 1 tokens in 9999999978 bytes" in error_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 20, 22, 30, 36])
def test_a_truncated_bin(tmp_path: Path, kept: int) -> None:
    file = write_bin(tmp_path / "x.bin", TWO)
    os.truncate(file, kept)
    assert f"{file}.meta: does not match x.bin ({kept} bytes)" in error_of(tmp_path)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


class Trap:
    """Fails the test where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Trap()),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 2)}\n") + pickle.dumps([Trap()]),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000000000, 2)}\n"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 2)}\n"),
        b"",
        b"0 3\n24 1\n",
    ],
    ids=["pickle", "objects", "absurd size", "large size", "empty", "text"],
)
def test_a_meta_that_isnt_plain_numbers(tmp_path: Path, content: bytes) -> None:
    file = write_bin(tmp_path / "x.bin", [[1, 2, 3], [4]])
    file.with_name("x.bin.meta").write_bytes(content)
    error = error_of(tmp_path)
    assert f"{file}.meta: is not a plain NumPy array" in error
    assert "Pickled arrays are refused" in error


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.int64), np.zeros((2, 2)), np.zeros(4, np.int64)])
def test_a_meta_of_another_shape(tmp_path: Path, array: np.ndarray) -> None:
    file = write_bin(tmp_path / "x.bin", [[1, 2, 3], [4]])
    with file.with_name("x.bin.meta").open("wb") as stream:
        np.save(stream, array)
    assert "expected integers of shape [samples, 2], got " in error_of(tmp_path)


def test_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    file = write_bin(tmp_path / "x.bin", [[1], [2, -VOCAB, 3]])
    assert error_of(tmp_path) == (
        f"{file}:2 (sample 1, byte 16): contains token 100, but model.vocab_size is 100. "
        "Tokenize the texts with the tokenizer of the model"
    )


def test_a_wrong_tokenizer_shows_at_once(tmp_path: Path) -> None:
    write_bin(tmp_path / "a/x.bin", [[1, 2]])
    write_bin(tmp_path / "b/x.bin", [[VOCAB]])
    with pytest.raises(DataError, match=r"b/x\.bin:1"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"tokens": [1, 2,]}', "is not a JSON line"),
        ('["tokens", 1, 2]', "is not a JSON line"),
        ('{"text": [1, 2]}', "is not a JSON line"),
        ('{"tokens": [1, [2]]}', "is not a JSON line"),
        ('{"tokens": [1, 2.5]}', "expected a list of integers as tokens, got float64 of shape [2]"),
        ('{"tokens": [1, "2"]}', "expected a list of integers as tokens, got <U"),
        ('{"tokens": "1, 2"}', "expected a list of integers as tokens, got <U4 of shape []"),
        ('{"tokens": [1, 18446744073709551616]}', "expected a list of integers as tokens, got object of shape [2]"),
        ('{"tokens": [1, 2, 3]}', "expected 2 tokens as in x.bin.meta, got 3"),
        ('{"tokens": [1]}', "expected 2 tokens as in x.bin.meta, got 1"),
    ],
)
def test_a_bad_line(tmp_path: Path, line: str, said: str) -> None:
    file = write_bin(tmp_path / "x.bin", [[5], [1, 2], [6]])
    first, _, last = file.read_text().splitlines()
    file.write_text(f"{first}\n{line}\n{last}\n")
    write_meta(file, [(0, 1), (16, 2), (16 + len(line) + 1, 1)])
    error = error_of(tmp_path)
    assert f"{file}:2 (sample 1, byte 16): " in error
    assert said in error


# -- a file that changes while it is used


@pytest.mark.parametrize("was_read", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: os.truncate(file, 20), "has changed since it was opened (38 bytes then, 20 bytes now)"),
        (lambda file: file.write_text(file.read_text().replace("4", "5")), "has changed since it was opened"),
    ],
    ids=["truncated", "changed"],
)
def test_a_file_that_changes_is_named(
    tmp_path: Path, change: Callable[[Path], object], said: str, was_read: bool
) -> None:
    write_bin(tmp_path / "t/x.bin", TWO)
    second = write_bin(tmp_path / "t/y.bin", TWO)
    os.utime(second, ns=(0, 0))
    source = opened(tmp_path)
    if was_read:
        assert source.read(3).tolist() == [4]
    change(second)
    with pytest.raises(DataError) as caught:
        source.read(3)
    assert str(caught.value).startswith(f"{second}:2 (sample 1, byte 22): ")
    assert said in str(caught.value)


def test_a_replaced_file_is_named_or_read_as_it_was(tmp_path: Path) -> None:
    first, second = (write_bin(tmp_path / f"t/{name}.bin", TWO) for name in "xy")
    source = opened(tmp_path)  # which reads the first file of each type
    for file in (first, second):
        file.unlink()
        os.utime(write_bin(file, [[1, 2, 3], [9]]), ns=(0, 0))
    assert source.read(1).tolist() == [4]
    with pytest.raises(DataError, match=r"y.bin:2 \(sample 1, byte 22\): the file has changed since it was opened"):
        source.read(3)


def test_a_removed_file_is_named(tmp_path: Path) -> None:
    _, second = (write_bin(tmp_path / f"t/{name}.bin", TWO) for name in "xy")
    source = opened(tmp_path)
    second.unlink()
    with pytest.raises(DataError, match=r"y.bin:1 \(sample 0, byte 0\): cannot be read \(No such file or directory\)"):
        source.read(2)
