"""Texts at the edges of what tokenizing meets: suffixes, types of columns, and rows that cannot be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.cli.main import main
from internlm.data.bad_rows import BadRows, escape_control
from internlm.data.text_files import find_texts
from internlm.data.texts import read_texts
from internlm.utils.errors import DataError

LINE = b'{"text": "a document"}\n'


def texts_of(*paths: Path, bad: BadRows | None = None, key: str = "text") -> list[str]:
    return list(read_texts(find_texts(map(str, paths)).files, key, bad=bad))


# -- files


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def test_suffixes_in_any_case_and_compressed(tmp_path: Path) -> None:
    contents = {
        "a.JSONL": LINE,
        "b.TXT": b"plain text\n",
        "c.jsonl.gz": gzip.compress(LINE) + gzip.compress(LINE),
        "d.part-0.jsonl.ZST": zstd(LINE) + zstd(LINE),
        "e.txt.gz": gzip.compress(b"one\ntwo\n"),
        "f.json.zst": zstd(b'[{"text": "three"}, {"text": "four"}]'),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    document = "a document"
    assert texts_of(tmp_path) == [document, "plain text", *[document] * 4, "one", "two", "three", "four"]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.md", "sub/c.gz", "d.csv.gz", "no_suffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    found = find_texts([str(tmp_path)])
    assert [file.path.name for file in found.files] == ["a.txt"]
    left_out = sorted(path.name for path in found.left_out)
    assert left_out == ["b.md", "c.gz", "d.csv.gz", "dangling.txt", "linked", "no_suffix"]


# -- columns

TEXTS = ["one document", "another document", None]
COLUMNS = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "large_dictionary": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
}


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


WRITERS = {"x.parquet": pyarrow.parquet.write_table, "x.arrow": write_stream, "y.arrow": write_file}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", COLUMNS)
def test_columns(column: str, name: str, tmp_path: Path) -> None:
    WRITERS[name](pa.table({"id": [1, 2, 3], "text": COLUMNS[column]}), tmp_path / name)
    bad = BadRows()
    assert texts_of(tmp_path / name, bad=bad) == TEXTS[:2]
    assert bad.totals() == [f"null text, left out: 1 ({tmp_path / name}, row 2)"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("nulls", [pa.nulls(2), pa.nulls(2, pa.string())])
def test_a_file_of_nulls_is_no_reason_to_stop(nulls: pa.Array, name: str, tmp_path: Path) -> None:
    WRITERS[name](pa.table({"text": nulls}), tmp_path / name)
    (tmp_path / "z.txt").write_text("after")
    bad = BadRows()
    assert texts_of(tmp_path, bad=bad) == ["after"]
    assert bad.count("null text, left out") == 2


@pytest.mark.parametrize("name", WRITERS)
def test_columns_without_strings(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](pa.table({"id": [1, 2], "n": pa.array([1, 2]).dictionary_encode()}), path)
    with pytest.raises(DataError, match=r"expected strings in column 'id', got int64\. Pass the key"):
        texts_of(path, key="id")
    with pytest.raises(DataError, match="has no key 'text', only 'id', 'n'"):
        texts_of(path)
    bad = BadRows("skip")
    assert texts_of(path, bad=bad) == []
    assert bad.totals() == [f"no column 'text', skipped: 1 ({path})"]


def damaged_strings() -> pa.Array:
    data = b"\0\0\0\0\2\0\0\0\4\0\0\0\6\0\0\0", b"ab\xff\xffcd"
    return pa.Array.from_buffers(pa.string(), 3, [None, *map(pa.py_buffer, data)])


def test_bytes_in_a_column_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"text": damaged_strings()}), path)
    with pytest.raises(DataError, match=r"x\.parquet, row 1: is not valid UTF-8"):
        texts_of(path)
    bad = BadRows("skip")
    assert texts_of(path, bad=bad) == ["ab", "cd"]
    assert bad.totals() == [f"invalid UTF-8, skipped: 1 ({path}, row 1)"]


@given(data=st.data())
def test_damaged_columns_are_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from(sorted(WRITERS)))
    path = folder / name
    WRITERS[name](pa.table({"text": ["first", "second", "third" * 9]}), path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    message = str(path)
    try:
        texts_of(path)
    except DataError as error:
        message = str(error)
    assert message.startswith(str(path))


def test_a_column_name_that_is_not_utf_8_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    WRITERS["x.arrow"](pa.table({"text": ["first"]}), path)
    path.write_bytes(path.read_bytes().replace(b"text", b"\xf4ext"))
    with pytest.raises(DataError, match=r"x\.arrow: is not a complete arrow file"):
        texts_of(path)


# -- bad rows

BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    "invalid UTF-8": ("a.jsonl", b'{"text": "\xff"}', "is not valid UTF-8"),
    "invalid JSON": ("a.jsonl", b'{"text": "cut', "is not valid JSON"),
    "invalid JSON, deep": ("a.jsonl", b"[" * 100_000, "is not valid JSON"),
    "no key 'text'": ("a.jsonl", b'{"body": "x"}', "has no key 'text', only 'body'"),
    "no JSON object": ("a.jsonl", b'["x"]', "expected a JSON object, got list"),
    "no string": ("a.jsonl", b'{"text": 3}', "expected a string at key 'text', got int"),
    "invalid UTF-8 of text": ("a.txt", b"\xff", "is not valid UTF-8"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_fails_or_is_skipped_and_counted(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, row, message = BAD_ROWS[case]
    good = LINE.strip() if name == "a.jsonl" else b"a document"
    path = tmp_path / name
    path.write_bytes(b"\n".join([good, *[row] * 5, good, row]))
    with pytest.raises(DataError, match=rf"^{path}:2: {message}"):
        texts_of(path)
    bad = BadRows("skip")
    assert texts_of(path, bad=bad) == ["a document"] * 2
    (total,) = bad.totals()
    assert total.endswith(f", skipped: 6 ({path}:2, {path}:3, {path}:4, …)")
    assert [record.getMessage().split(f" {message}")[0] for record in caplog.records] == [f"{path}:2:"]


def test_a_damaged_file_is_used_up_to_the_damage(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(50_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    (tmp_path / "b.json").write_bytes(b"[1, 2")
    (tmp_path / "c.txt").write_bytes(b"after")
    bad = BadRows("skip")
    *texts, last = texts_of(tmp_path, bad=bad)
    assert last == "after"
    assert len(texts) > 40_000
    assert texts == [str(i) for i in range(len(texts))]
    assert bad.totals() == [
        f"damaged file, skipped: 1 ({tmp_path}/a.jsonl.gz)",
        f"invalid JSON, skipped: 1 ({tmp_path}/b.json)",
    ]


def test_lone_surrogates_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    rows = [r"first", r"half a pair \ud83d here", r"a pair \ud83d\ude00", r"\udc00\udc00"]
    path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    bad = BadRows()
    assert texts_of(path, bad=bad) == ["first", "half a pair \ufffd here", "a pair \U0001f600", "\ufffd\ufffd"]
    assert bad.totals() == [f"lone surrogates, replaced by U+FFFD: 2 ({path}:2, {path}:4)"]
    assert len(caplog.records) == 1


def test_null_and_blank_texts_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n\n{"text": " "}\n{"text": ""}\n{"text": "x"}')
    bad = BadRows()
    assert texts_of(path, bad=bad) == ["x"]
    assert bad.totals() == [
        f"null text, left out: 1 ({path}:1)",
        f"blank text, left out: 2 ({path}:3, {path}:4)",
    ]


@given(text=st.text(st.characters(exclude_categories=[])))
def test_any_json_string_can_be_tokenized(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    for read in texts_of(path):
        assert read.encode().decode() == read
        assert len(read) == len(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def test_control_characters_are_escaped() -> None:
    assert escape_control("a\nb\x1b[31mé\x9b") == r"a\x0ab\x1b[31mé\x9b"


# -- the command


@pytest.fixture
def tokenize(tmp_path: Path, sentencepiece_model: Path) -> Callable[..., int]:
    """The command itself, which writes ``out/x.bin``; it returns the exit code."""

    def call(*arguments: str, tokenizer: Path = sentencepiece_model) -> int:
        command = ["tokenize", "--bin_output_path", str(tmp_path / "out/x.bin"), "--tokenizer_path", str(tokenizer)]
        try:
            return main([*command, "--overwrite", "--num_workers", "1", *arguments]) or 0
        except SystemExit as error:
            return int(error.code or 0)

    return call


def test_the_command_names_the_bad_row_or_counts_it(
    tokenize: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in/a.jsonl"
    path.parent.mkdir()
    path.write_bytes(LINE + b'{"text": "\xff"}\n' + LINE + b'{"text": "\\ud83d"}\n')
    (tmp_path / "in/notes.md").write_text("left out")
    assert tokenize("--text_input_path", str(path)) == 2
    assert capsys.readouterr().err.startswith(f"{path}:2: is not valid UTF-8 (invalid start byte). Convert the file")
    assert not (tmp_path / "out/x.bin").exists()
    assert tokenize("--text_input_path", str(path.parent), "--on-error", "skip") == 0
    printed = capsys.readouterr().out.splitlines()
    size = 2 * len("a document") + len("\ufffd".encode())
    assert f"/out/x.bin: 3 samples, {(tokens := printed[0].split()[3])} tokens, {size} bytes of text, " in printed[0]
    assert printed[0].endswith(f" {size / int(tokens):.2f} bytes per token")
    assert printed[1:4] == [
        f"files left out, by their suffix: 1 ({tmp_path}/in/notes.md)",
        f"invalid UTF-8, skipped: 1 ({path}:2)",
        f"lone surrogates, replaced by U+FFFD: 1 ({path}:4)",
    ]
    assert "    model = dict(vocab_size=320, ...)" in printed
    assert f"    data = dict(train_folder='{tmp_path}/out', tokenizer_path=" in printed[-1]


def test_warnings_about_a_tokenizer(
    tokenize: Callable[..., int], tmp_path: Path, hugging_face_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no line end"}\n')
    assert tokenize("--text_input_path", str(path)) == 0
    assert tokenize("--text_input_path", str(path), tokenizer=hugging_face_folder) == 0
    assert not caplog.records
    path.write_text('{"text": "a line\\nend"}\n' * 2)
    assert tokenize("--text_input_path", str(path), tokenizer=hugging_face_folder) == 0
    assert not caplog.records
    assert tokenize("--text_input_path", str(path)) == 0
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/tokenizer.json").write_bytes((hugging_face_folder / "tokenizer.json").read_bytes())
    assert tokenize("--text_input_path", str(path), tokenizer=tmp_path / "bare") == 0
    line_ends, no_eos = (record.getMessage() for record in caplog.records)
    assert "tokenizer.model: drops line ends" in line_ends
    assert (
        f"{tmp_path}/bare: has no eos token, so nothing marks where a text ends. Name it in tokenizer_config.json"
        in no_eos
    )


def test_special_tokens_of_a_document(
    tokenize: Callable[..., int], tmp_path: Path, hugging_face_folder: Path, sentencepiece_model: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "<p><s>Hello.</s> Type exit to leave.</p>"}\n')
    for tokenizer, bos, eos in ((hugging_face_folder, 0, 1), (sentencepiece_model, 1, 2)):
        for flags, special in (((), [eos]), (("--parse-special-tokens",), [bos, eos, eos])):
            assert tokenize("--text_input_path", str(path), *flags, tokenizer=tokenizer) == 0
            ids = json.loads((tmp_path / "out/x.bin").read_text())["tokens"]
            assert [i for i in ids if i in (bos, eos)] == special
