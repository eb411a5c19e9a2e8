"""Texts of files in all formats: each of them once, from any place on; bad rows and damaged files are named."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.text_folder import find_text_files
from internlm.data.text_reader import TextReader
from internlm.data.text_splits import Selection
from internlm.data.text_units import Unit, divide
from internlm.utils.errors import DataError
from tests.unit.data.streams import json_lines, write_texts

FORMATS = (
    *("1.parquet", "stream.arrow", "file.arrow", "1.jsonl", "1.json", "1.txt", "1.TXT", "1.JSONL"),
    *("1.jsonl.gz", "1.txt.gz", "1.jsonl.zst", "1.jsonl.bz2", "1.json.gz"),
)


def open_reader(folder: Path, on_bad_row: Literal["fail", "skip"] = "fail") -> TextReader:
    selection = Selection("data.train_folder", "data.train_split", "train", None)
    reader = TextReader(find_text_files(folder, selection), "text", on_bad_row)
    for file in range(len(reader.files)):
        reader.check_first_row(file)
    return reader


def read(folder: Path, on_bad_row: Literal["fail", "skip"] = "fail", shards: int = 1) -> list[str]:
    reader = open_reader(folder, on_bad_row)
    units = divide(reader.layouts, shards).tolist()
    return [document.text for unit in units for document in reader.read(Unit(*unit))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_text_is_in_one_unit_and_is_found_from_any_place(tmp_path: Path, name: str) -> None:
    @given(lengths=st.lists(st.integers(1, 90), max_size=60), shards=st.integers(1, 40), block=st.integers(1, 70))
    def check(lengths: list[int], shards: int, block: int) -> None:
        texts = [f"{index}é".ljust(length, "x") for index, length in enumerate(lengths)]
        write_texts(tmp_path / name, texts, block)
        reader = open_reader(tmp_path)
        found = []
        for unit in (Unit(*unit) for unit in divide(reader.layouts, shards).tolist()):
            documents = list(reader.read(unit))
            found += [document.text for document in documents]
            if documents:
                middle = len(documents) // 2
                assert list(reader.read(unit, documents[middle].next)) == documents[middle + 1 :]
        assert sorted(found) == sorted(texts)

    check()


@pytest.mark.parametrize("shards", [1, 30])
def test_lines_longer_than_units_are_read_once(tmp_path: Path, shards: int) -> None:
    texts = ["a" * 5000, "b", "c" * 3000, "d" * 255, "e" * 256]
    write_texts(tmp_path / "1.txt", texts)
    assert sorted(read(tmp_path, shards=shards)) == sorted(texts)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "syntax": (b'{"text": "a', "is not valid JSON ("),
    "encoding": (b'{"text": "\xff"}', "is not valid UTF-8 ("),
    "no record": (b'["a"]', "expected a JSON object, got list"),
    "no key": (b'{"txt": "a"}', "has no key 'text' (data.content_name), only 'txt'"),
    "no string": (b'{"text": 5}', "expected a string at key 'text', got int"),
    "depth": (b'{"text": ' + b"[" * 99999, "is not valid JSON ("),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_row_is_named_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, suffix: str
) -> None:
    line, message = BAD_LINES[kind]
    content = json_lines(["first"]) + line + b"\n" + json_lines(["third"])
    file = tmp_path / f"1{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    problem = caught.value.problems[0]
    assert problem.where == f"{file}:2"
    assert problem.message.startswith(message)
    assert "data.on_bad_row = 'skip'" in problem.todo
    reader = open_reader(tmp_path, "skip")
    units = [Unit(*unit) for unit in divide(reader.layouts, 1).tolist()]
    assert [document.text for unit in units for document in reader.read(unit)] == ["first", "third"]
    assert caplog.records[-1].getMessage().startswith(f"{file}:2: {message}")
    (total,) = reader.bad_rows.totals()
    assert total.endswith(f"1 ({file}:2)")


def test_blank_texts_and_halves_of_surrogate_pairs_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "1.jsonl").write_bytes(
        b'{"text": "a\\ud800"}\n\n{"text": null}\n{"text": " "}\n{"text": "\\ud83d\\ude00"}\n'
    )
    reader = open_reader(tmp_path)
    units = [Unit(*unit) for unit in divide(reader.layouts, 1).tolist()]
    assert [document.text for unit in units for document in reader.read(unit)] == ["a\ufffd", "😀"]
    file = tmp_path / "1.jsonl"
    assert reader.bad_rows.totals() == [
        f"half of a surrogate pair, replaced by U+FFFD: 1 ({file}:1)",
        f"without text: 3 ({file}:2, {file}:3, {file}:4)",
    ]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array(["a", None, "b"], pa.large_string()),
    ],
    ids=lambda column: str(column.type).partition("<")[0],
)
def test_columns_of_all_kinds_of_strings_are_read(tmp_path: Path, column: Any) -> None:
    table = pa.table({"text": column})
    pq.write_table(table, tmp_path / "1.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "nulls.parquet")
    with pa.OSFile(str(tmp_path / "1.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path) == ["a", "b"] * 2


@pytest.mark.parametrize("name", ["1.parquet", "file.arrow", "stream.arrow"])
def test_a_wrong_column_is_named(tmp_path: Path, name: str) -> None:
    write_texts(tmp_path / name, ["a"])
    selection = Selection("data.train_folder", "data.train_split", "train", None)
    files = find_text_files(tmp_path, selection)
    with pytest.raises(DataError, match=rf"{name}: has no column 'txt', only 'id', 'text'\. Set data\.content_name"):
        TextReader(files, "txt", "skip")
    with pytest.raises(
        DataError, match=rf"{name}: expected strings in column 'id', got int64\. Set data\.content_name"
    ):
        TextReader(files, "id", "skip")


@pytest.mark.parametrize("name", ["1.jsonl", "1.json", "1.jsonl.gz"])
def test_a_key_that_the_first_row_lacks_is_an_error_even_if_bad_rows_are_left_out(tmp_path: Path, name: str) -> None:
    write_texts(tmp_path / name, ["a"])
    reader = TextReader(open_reader(tmp_path).files, "txt", "skip")
    with pytest.raises(
        DataError, match=rf"{name}:1: has no key 'txt' .* only ('id', )?'text'\. Set data\.content_name"
    ):
        reader.check_first_row(0)


def test_a_damaged_column_name_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "stream.arrow", ["a"])
    path.write_bytes(path.read_bytes().replace(b"text\0", b"\xf8ext\0"))
    with pytest.raises(DataError, match=r"stream\.arrow: cannot be read as arrow \('utf-8' codec"):
        open_reader(tmp_path)


@pytest.mark.parametrize("name", ["1.parquet", "file.arrow", "stream.arrow", "1.jsonl.gz", "1.json", "1.jsonl.zst"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    """A file that ends early or has a changed byte gives an error that names it, or texts; nothing else."""
    texts = [f"{index} fox jumps" for index in range(40)]
    content = write_texts(tmp_path / name, texts).read_bytes()

    @given(st.data())
    def check(data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(content) - 1))
        changed = bytearray(content)
        if data.draw(st.booleans()):
            del changed[at:]
        else:
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        (tmp_path / name).write_bytes(changed)
        found = []
        try:
            found = read(tmp_path, "skip")
        except DataError as error:
            found = [problem.where for problem in error.problems]
            assert all(where.startswith(str(tmp_path / name)) for where in found), found
        assert len(found) <= len(texts)

    check()


def test_a_file_that_changes_during_a_run_is_named(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "1.jsonl", ["a", "b"])
    reader = open_reader(tmp_path)
    file.write_bytes(file.read_bytes() + json.dumps({"text": "c"}).encode())
    message = r"1\.jsonl: the file has changed since it was opened \(\d+ bytes then, \d+ bytes now\)\. Restore"
    with pytest.raises(DataError, match=message):
        list(reader.read(Unit(0, 0, 0, 10)))
    file.unlink()
    with pytest.raises(DataError, match=r"1\.jsonl: cannot be read \(No such file or directory\)\. Restore"):
        list(reader.read(Unit(0, 0, 0, 10)))
