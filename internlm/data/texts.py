"""Readers of text samples from .txt, .json, .jsonl and .parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError, Problem
from internlm.utils.lazy import require


def find_texts(paths: Iterable[str]) -> list[Path]:
    """Return the files among ``paths`` and the text files in the folders among them, each folder sorted.

    Raises:
        DataError: A path does not exist, a folder contains no text file, or a file type is not supported.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
            if not inside:
                raise DataError(Problem(str(path), f"contains no text file (supported: {KNOWN})"))
            found += inside
        elif not path.is_file():
            raise DataError(Problem(str(path), "no such file or folder"))
        elif path.suffix not in _READERS:
            raise DataError(
                Problem(
                    str(path),
                    f"file type {path.suffix!r} is not supported (supported: {KNOWN})",
                    "Rename or convert the file",
                )
            )
        else:
            found.append(path)
    return found


def read_texts(files: Iterable[Path], text_key: str, whole_file: bool) -> Iterator[str]:
    """Yield the samples of the files in order; skip blank ones.

    Args:
        files: Files of supported types.
        text_key: Key of the text in a record of .json, .jsonl and .parquet files.
        whole_file: Treat a .txt file as one sample, not each line.

    Raises:
        DataError: A file or a line of it cannot be read.
    """
    for file in files:
        reader = _whole_text if whole_file and file.suffix == ".txt" else _READERS[file.suffix]
        try:
            yield from (text for text in reader(file, text_key) if text and not text.isspace())
        except OSError as error:
            raise DataError(Problem(str(file), f"cannot be read ({error.strerror or error})")) from error


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield ``("file:line", text)`` for each line, without the line end."""
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
    """Yield the texts of a list of records, or of a single record."""
    content = _parse(_decode(file.read_bytes(), str(file)), str(file))
    for index, record in enumerate(content if isinstance(content, list) else [content]):
        yield _text_of(record, text_key, f"{file}, record {index}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(where, f"is not valid JSON ({error})", "Name a file of JSON lines .jsonl")) from error


def _text_of(record: object, text_key: str, where: str) -> str | None:
    if not isinstance(record, dict):
        raise DataError(Problem(where, f"expected a JSON object, got {type(record).__name__}"))
    if text_key not in record:
        raise _no_such_key(where, text_key, record)
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        raise DataError(Problem(where, f"expected text in '{text_key}', got {type(text).__name__}"))
    return text


def _parquet(file: Path, text_key: str) -> Iterator[str | None]:
    pyarrow = require("pyarrow", str(file), "pip install pyarrow")
    parquet = require("pyarrow.parquet", str(file), "pip install pyarrow")
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(Problem(str(file), f"is not a parquet file ({error})")) from error
    with table:
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise _no_such_key(str(file), text_key, schema.names)
        column_type = schema.field(text_key).type
        if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
            raise DataError(Problem(str(file), f"expected text in '{text_key}', got {column_type}"))
        # In batches: a parquet file may be larger than memory.
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            yield from batch.column(0).to_pylist()


def _no_such_key(where: str, text_key: str, keys: Iterable[str]) -> DataError:
    known = ", ".join(f"'{key}'" for key in keys)
    return DataError(Problem(where, f"has no key '{text_key}', only {known}", "Set --text_key to one of them"))


_READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".json": _json_records,
    ".parquet": _parquet,
}
KNOWN = ", ".join(_READERS)
