"""Folders of local Hugging Face datasets: files, splits, sub-sets, dataset types and fingerprint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from internlm.data.fingerprint import LEVELS, Level
from internlm.data.text_folder import digest_files, find_text_files, fingerprint
from internlm.data.text_splits import Selection
from internlm.utils.errors import DataError
from tests.unit.data.streams import write_texts

README = """---
license: mit
configs:
- config_name: code
  data_files:
  - split: train
    path: ["src/train-*.parquet", "more/*.jsonl"]
  - split: test
    path: src/test.parquet
- config_name: prose
  data_files: books/**
---
# A dataset
"""


def files_of(folder: Path, split: str = "train", subset: str | None = None) -> dict[str, str]:
    """Names of the selected files, with their dataset types."""
    files = find_text_files(folder, Selection("data.train_folder", "data.train_split", split, subset))
    return {file.name: file.type_name for file in files}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text\n")
    return folder


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a.txt", "en/x/y/b.jsonl", "cn/C.TXT"], "train", {"a.txt": "", "en/x/y/b.jsonl": "en", "cn/C.TXT": "cn"}),
        (["data/train-0-of-2.arrow", "data/test-0-of-2.arrow"], "train", {"data/train-0-of-2.arrow": ""}),
        (["en/train.jsonl.gz", "cn/val.jsonl.gz"], "validation", {"cn/val.jsonl.gz": "cn"}),
        (["train/en/1.txt", "dev/en/1.txt"], "valid", {"dev/en/1.txt": "en"}),
        # Other files of a dataset: hidden ones, results that `datasets` keeps, descriptions.
        ([".git/a.txt", "train/cache-1.arrow", "train/a.arrow", "train/state.json"], "train", {"train/a.arrow": ""}),
    ],
    ids=["types", "names of files", "suffixes", "folders", "others"],
)  # fmt: skip
def test_splits_and_types_follow_from_paths(
    tmp_path: Path, names: list[str], split: str, expected: Mapping[str, str]
) -> None:
    found = files_of(touch(tmp_path, *names), split)
    assert found == {name: type_name or "default" for name, type_name in expected.items()}


def test_subsets_follow_from_the_front_matter(tmp_path: Path) -> None:
    touch(tmp_path, "src/train-1.parquet", "src/test.parquet", "more/a.jsonl", "books/a/b.txt", "unlisted.txt")
    (tmp_path / "README.md").write_text(README)
    code = {"src/train-1.parquet": "code", "more/a.jsonl": "code"}
    assert files_of(tmp_path) == {**code, "books/a/b.txt": "prose"}
    assert files_of(tmp_path, subset="code") == code
    assert files_of(tmp_path, "test") == {"src/test.parquet": "code"}
    with pytest.raises(DataError, match=r"^data\.subset: 'cod', but .* lists no such sub-set\. Known: code, prose\.$"):
        files_of(tmp_path, subset="cod")
    (tmp_path / "README.md").write_text(README.replace("path: src", "pat: src"))
    with pytest.raises(DataError, match=r"README\.md: configs: cannot be read \(KeyError: 'path'\)\. Correct"):
        files_of(tmp_path)


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "train.txt", "test.txt", "notes.txt", "a.pdf", "b.pdf")
    with caplog.at_level(logging.INFO, "internlm"):
        assert files_of(tmp_path) == {"train.txt": "default"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 2 files ('a.pdf', 'b.pdf') left out: unsupported type",
        f"{tmp_path}: 1 file ('notes.txt') left out: no split in the path",
    ]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["a.pdf"], "train", r"contains no text file \(supported: \.parquet, .*\)\. Set data\.train_folder to"),
        (["train.txt"], "test", r"data\.train_split: 'test', but .* has no such split\. Known: train\."),
        (["e\nn/a.txt"], "train", r"the dataset type 'e\\nn' has control characters in its name\. Rename"),
    ],
    ids=["no file", "no split", "garbled"],
)
def test_wrong_folders_are_refused(tmp_path: Path, names: list[str], split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        files_of(touch(tmp_path, *names), split)
    with pytest.raises(DataError, match=r"/none: no such folder\. Set data\.train_folder"):
        files_of(tmp_path / "none")
    file = next(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(DataError, match=r": expected a folder, got a file\. Set data\.train_folder"):
        files_of(file)


def test_a_named_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"/a\.jsonl: is not a regular file\. Remove it"):
        files_of(tmp_path)


def test_validation_on_training_files_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    selection = Selection("data.valid_folder", "data.valid_split", "valid", None, is_trained_on=True)
    message = "no path names a split, so validation reads the same files as training"
    find_text_files(touch(tmp_path, "a.txt"), selection)
    assert message in caplog.text
    caplog.clear()
    find_text_files(touch(tmp_path, "validation.txt"), selection)
    assert message not in caplog.text


@pytest.mark.parametrize("level", LEVELS)
def test_the_fingerprint_covers_content_and_not_the_place(tmp_path: Path, level: Level) -> None:
    def of(folder: Path) -> str:
        files = find_text_files(folder, Selection("data.train_folder", "data.train_split", "train", None))
        return fingerprint(files, digest_files(files, level), level)

    file = write_texts(tmp_path / "a" / "1.jsonl", ["one", "two"] * 99)
    write_texts(tmp_path / "b" / "1.jsonl", ["one", "two"] * 99)
    before, times = of(tmp_path / "a"), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert before == of(tmp_path / "b")
    file.write_bytes(file.read_bytes().replace(b"two", b"six"))
    os.utime(file, ns=times)  # neither the size nor the time tells
    assert (before == of(tmp_path / "a")) == (level == "stat")
