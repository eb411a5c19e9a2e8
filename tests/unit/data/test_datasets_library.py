"""Streamed folders against the `datasets` library: the same texts, splits and sub-sets; resuming, where it differs."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from internlm.data.shard_documents import Place
from internlm.data.text_folder import find_text_files
from internlm.data.text_reader import TextReader
from internlm.data.text_splits import Selection
from internlm.data.text_units import Unit, divide
from internlm.utils.errors import DataError
from tests.unit.data.streams import open_stream


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The `datasets` library, without the network and without a cache outside the test."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(cache))
        datasets = importlib.import_module("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield datasets


def dataset(library: Any, texts: list[str | None]) -> Any:
    return library.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})


def write(library: Any, folder: Path, *names: str) -> Path:
    """Write a file for each name with the library's own writers; its texts name it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = dataset(library, [f"{name} {index}" for index in range(3)])
        if path.suffix == ".parquet":
            texts.to_parquet(path, batch_size=2)
        elif ".json" in name:
            texts.to_json(path, lines=path.suffix != ".json", compression="gzip" if path.suffix == ".gz" else None)
        else:
            path.write_text("".join(f"{text}\n" for text in texts["text"]))
    return folder


def ours(folder: Path, split: str, subset: str | None = None) -> Counter[str]:
    """Texts that are streamed."""
    files = find_text_files(folder, Selection("data.train_folder", "data.train_split", split, subset))
    reader = TextReader(files, "text", "fail")
    return Counter(doc.text for unit in divide(reader.layouts, 1).tolist() for doc in reader.read(Unit(*unit)))


def theirs(loaded: Any) -> Counter[str]:
    """Texts of a dataset of the library, apart from blank ones."""
    return Counter(text for text in loaded["text"] if text and not text.isspace())


def loaded(library: Any, folder: Path, split: str, subset: str | None = None) -> Any:
    return library.load_dataset(str(folder), subset, split=split)


FOLDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shards": (
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"),
        ("train", "validation"),
    ),
    "any name of a split": (
        ("data/train-00000-of-00001.parquet", "data/rare-00000-of-00001.parquet", "data/a.b-00000-of-00001-x.parquet"),
        ("train", "rare", "a.b"),
    ),
    "words with digits": (("train1.txt", "train2.txt", "test2020.txt"), ("train", "test")),
    "folders before files": (("train/a.jsonl", "train_more.jsonl", "my-dev-set/b.jsonl"), ("train", "validation")),
    "folders at any depth": (("en/train/a.json", "en/val/b.json", "cn/x/train/c.json"), ("train", "validation")),
    "parts of words": (("trainer.txt", "contest.txt", "b/latest.txt"), ("train",)),
    "hidden": ((".a.txt", ".git/b.txt", "__pycache__/c.txt", "_d.txt", "_e/f.txt", "g.txt"), ("train",)),
    "compressed": (("train.jsonl.gz", "test.jsonl.gz"), ("train", "test")),
    "notes": (("a.jsonl", "b.jsonl", "requirements.txt"), ("train",)),
    "a note": (("a.parquet", "LICENSE.txt"), ("train",)),
    "settings of a model": (("a.jsonl", "config.json"), ("train",)),
}


@pytest.mark.parametrize(("names", "splits"), FOLDERS.values(), ids=FOLDERS)
def test_splits_follow_from_paths_as_in_the_library(
    library: Any, tmp_path: Path, names: tuple[str, ...], splits: tuple[str, ...]
) -> None:
    write(library, tmp_path, *names)
    for split in splits:
        assert ours(tmp_path, split) == theirs(loaded(library, tmp_path, split)) != Counter()


CONFIGS = """
- config_name: one
  data_files:
  - split: train
    path: [a/*.txt, "c/x[0-1].txt"]
  - split: dev
    path: "**/x2.txt"
- config_name: all
  data_files: a/**
- config_name: folder
  data_dir: b
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_subsets_follow_from_the_front_matter_as_in_the_library(library: Any, tmp_path: Path, line_end: str) -> None:
    write(library, tmp_path, "a/x.txt", "a/deep/y.txt", "b/train.txt", "b/test.txt", "c/x1.txt", "c/x2.txt", "z.txt")
    readme = f"---\nlicense: mit\nconfigs:{CONFIGS}---\n# Texts\n"
    (tmp_path / "README.md").write_bytes(readme.replace("\n", line_end).encode())
    pairs = [("one", "train"), ("one", "dev"), ("all", "train"), ("folder", "train"), ("folder", "test")]
    for subset, split in pairs:
        assert ours(tmp_path, split, subset) == theirs(loaded(library, tmp_path, split, subset)) != Counter()
    assert ours(tmp_path, "validation", "one") == ours(tmp_path, "dev", "one")
    (tmp_path / "README.md").write_text(readme.replace("a/**", "d/**"))
    with pytest.raises(DataError, match=r"README\.md: no text file matches 'd/\*\*', of sub-set 'all' and split 'tr"):
        ours(tmp_path, "train", "all")


def test_texts_are_those_of_the_library(library: Any, tmp_path: Path) -> None:
    texts = ["a\nb", 'tab\t "quote" \\', "ä\u2028ö 😀", " ", "", None, "x" * 5000, "last"]
    table = dataset(library, texts)
    large = library.Features({"id": library.Value("int32"), "text": library.Value("large_string")})
    table.to_json(tmp_path / "lines.jsonl")
    table.to_json(tmp_path / "list.json", lines=False)
    table.to_json(tmp_path / "ascii.jsonl.gz", compression="gzip", force_ascii=True)
    table.to_parquet(tmp_path / "a.parquet", batch_size=3)
    table.cast(large).to_parquet(tmp_path / "large.parquet")
    (tmp_path / "lines.txt").write_bytes("one\r\n\r\n two\u2028\x0c\x85 \n\nthree".encode())
    for number, file in enumerate(sorted(tmp_path.iterdir())):
        folder = tmp_path / str(number)
        folder.mkdir()
        file.rename(folder / file.name)
        assert ours(folder, "train") == theirs(loaded(library, folder, "train")) != Counter()


def test_saved_datasets(library: Any, tmp_path: Path) -> None:
    table = dataset(library, [f"text {index}" for index in range(10)])
    # Of an earlier dataset in the same place, old files remain.
    table.save_to_disk(tmp_path / "one", num_shards=3)
    table.select(range(4, 8)).save_to_disk(tmp_path / "one", num_shards=2)
    read = theirs(library.load_from_disk(tmp_path / "one"))
    assert ours(tmp_path / "one", "train") == read == Counter(table["text"][4:8])
    splits = {"train": table, "rare": table.select([0, 2]), "a.b": table.filter(lambda x: x["id"] > 7)}
    library.DatasetDict(splits).save_to_disk(tmp_path / "dict", num_shards={"train": 4, "rare": 1, "a.b": 1})
    for split, of_split in library.load_from_disk(tmp_path / "dict").items():
        assert ours(tmp_path / "dict", split) == theirs(of_split) == theirs(splits[split])
    files = find_text_files(tmp_path / "dict", Selection("", "", "rare", None))
    assert {file.type_name for file in files} == {"default"}
    with pytest.raises(DataError, match=r"'test', but .* has no such split\. Known: a\.b, rare, train\."):
        ours(tmp_path / "dict", "test")
    # A dataset of the name that is given to numbered files of any split.
    table.save_to_disk(tmp_path / "outer" / "data")
    assert ours(tmp_path / "outer", "train") == Counter(table["text"])
    next((tmp_path / "dict" / "train").glob("*2-of-*.arrow")).unlink()
    with pytest.raises(DataError, match=r"/train/state\.json: lists 'data-00002-of-00004\.arrow', which is missing\."):
        ours(tmp_path / "dict", "train")


def test_a_resumed_stream_keeps_what_the_shuffle_of_the_library_loses(
    library: Any, tmp_path: Path, hugging_face_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"text {index}" for index in range(100)]
    table = dataset(library, list(texts))
    table.to_parquet(tmp_path / "train.parquet", batch_size=10)
    buffer, consumed = 16, 30
    stream, resumed = (table.to_iterable_dataset(4).shuffle(seed=1, buffer_size=buffer) for _ in range(2))
    records = iter(stream)
    before = [record["text"] for record in islice(records, consumed)]
    resumed.load_state_dict(stream.state_dict())
    with caplog.at_level(logging.ERROR):
        after = [record["text"] for record in resumed]
    assert sorted(before + [record["text"] for record in records]) == sorted(texts)
    assert set(before + after) < set(texts)  # the texts in the buffer are lost

    documents = open_stream(tmp_path, hugging_face_folder, shuffle_buffer=buffer, stream_shards=1).documents
    tokenizer: Any = documents.tokenizer

    def read(place: Place) -> Iterator[tuple[str, Place]]:
        for document in documents.documents(0, place):
            yield tokenizer.decode(document.tokens[:-1].tolist()), document.place

    straight = list(islice(read(Place()), len(texts)))
    assert [text for text, _ in straight] != sorted(texts)
    _, place = straight[consumed]
    assert list(islice(read(place), len(texts) - consumed)) == straight[consumed:]
    assert sorted(text for text, _ in straight) == sorted(texts)
