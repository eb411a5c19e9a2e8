"""Readers of text samples from .txt, .json, .jsonl and .parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError, Problem
from internlm.utils.lazy import require


def find_texts(paths: Iterable[str]) -> list[Path]:
    """Expand paths of files and folders to a list of text files.

    Args:
        paths: Files, and folders that are searched at any depth.

    Returns:
        The files in the order of ``paths``; those of a folder are sorted.

    Raises:
        DataError: A path does not exist, a folder contains no text file, or a file type is not supported.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
            if not inside:
                message = f"contains no text file (supported: {KNOWN})"
                raise DataError(Problem(str(path), message, "Pass text files or their folder as --text_input_path"))
            found += inside
        elif not path.is_file():
            todo = "Pass existing files or folders as --text_input_path"
            raise DataError(Problem(str(path), "no such file or folder", todo))
        elif path.suffix not in _READERS:
            raise DataError(
                Problem(
                    str(path),
                    f"file type {path.suffix!r} is not supported (supported: {KNOWN})",
                    "Convert the file, or correct its suffix",
                )
            )
        else:
            found.append(path)
    return found


def read_texts(files: Iterable[Path], text_key: str, whole_file: bool) -> Iterator[str]:
    """Yield the text samples of ``files`` in order, except blank ones.

    Args:
        files: Files of supported types.
        text_key: Key of the text in a record of .json, .jsonl and .parquet files.
        whole_file: Yield each .txt file as one sample, instead of one sample per line.

    Raises:
        DataError: A file cannot be read, or a record has no text.
    """
    for file in files:
        reader = _whole_text if whole_file and file.suffix == ".txt" else _READERS[file.suffix]
        try:
            yield from (text for text in reader(file, text_key) if text and not text.isspace())
        except OSError as error:
            message = f"cannot be read ({error.strerror or error})"
            raise DataError(Problem(str(file), message, "Check the file and its permissions")) from error


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield ``("file:line", text)`` for each line, without the line ending."""
    with file.open("rb") as stream:
        # Binary lines end at \n only. Text mode would also split at a lone \r, and str.splitlines at U+2028, which JSON
        # strings may contain.
        for index, line in enumerate(stream, 1):
            where = f"{file}:{index}"
            yield where, _decode(line, where).rstrip("\r\n")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # drops the byte-order mark that some editors write
    except UnicodeDecodeError as error:
        raise DataError(Problem(where, f"is not valid UTF-8 ({error.reason})", "Convert the file to UTF-8")) from error


def _text_lines(file: Path, text_key: str) -> Iterator[str]:
    return (line for _, line in _lines(file))


def _whole_text(file: Path, text_key: str) -> Iterator[str]:
    yield _decode(file.read_bytes(), str(file))


def _json_lines(file: Path, text_key: str) -> Iterator[str | None]:
    return (_text_of(_parse(line, where), text_key, where) for where, line in _lines(file) if line.strip())


def _json_records(file: Path, text_key: str) -> Iterator[str | None]:
    """Yield the texts of a JSON list of records, or of a single JSON record."""
    content = _parse(_decode(file.read_bytes(), str(file)), str(file))
    for index, record in enumerate(content if isinstance(content, list) else [content]):
        yield _text_of(record, text_key, f"{file}, record {index}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        todo = "Correct its syntax; a file with one record per line needs the suffix .jsonl"
        raise DataError(Problem(where, f"is not valid JSON ({error})", todo)) from error


def _text_of(record: object, text_key: str, where: str) -> str | None:
    if not isinstance(record, dict):
        todo = f'Write each record as {{"{text_key}": "..."}}'
        raise DataError(Problem(where, f"expected a JSON object, got {type(record).__name__}", todo))
    if text_key not in record:
        raise _no_such_key(where, text_key, record)
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        message = f"expected a string at key '{text_key}', got {type(text).__name__}"
        raise DataError(Problem(where, message, "Pass the key of the text as --text_key"))
    return text


def _parquet(file: Path, text_key: str) -> Iterator[str | None]:
    pyarrow = require("pyarrow", str(file), "pip install pyarrow")
    parquet = require("pyarrow.parquet", str(file), "pip install pyarrow")
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        todo = "Convert the file, or correct its suffix"
        raise DataError(Problem(str(file), f"is not a Parquet file ({error})", todo)) from error
    with table:
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise _no_such_key(str(file), text_key, schema.names)
        column_type = schema.field(text_key).type
        if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
            message = f"expected strings in column '{text_key}', got {column_type}"
            raise DataError(Problem(str(file), message, "Pass the name of the text column as --text_key"))
        # In batches: a Parquet file may be larger than memory.
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            yield from batch.column(0).to_pylist()


def _no_such_key(where: str, text_key: str, keys: Iterable[str]) -> DataError:
    known = ", ".join(f"'{key}'" for key in keys)
    if not known:
        return DataError(Problem(where, f"has no key '{text_key}', nor any other", "Remove the empty record"))
    return DataError(Problem(where, f"has no key '{text_key}', only {known}", "Pass one of these keys as --text_key"))


_READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".json": _json_records,
    ".parquet": _parquet,
}
KNOWN = ", ".join(_READERS)
