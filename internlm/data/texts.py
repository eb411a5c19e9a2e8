"""Readers of text samples and records from the files of :mod:`internlm.data.text_files`.

A record is a dict, such as a line of a .jsonl file or a row of a .parquet file. Rows that cannot be used are errors, or
are skipped and counted, as :class:`~internlm.data.bad_rows.BadRows` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

from internlm.data.bad_rows import BadRows
from internlm.data.text_columns import column_records
from internlm.data.text_files import COLUMNAR, TextFile, checking, no_such_key, open_file
from internlm.utils.errors import Problem

TODO = "Pass the key of the text as --text_key"

#: Records with their row in the file.
Records: TypeAlias = Iterator[tuple[int, object]]

#: Place of a row, by format; lines are counted from 1, others from 0.
_PLACE = {".txt": "{}:{}", ".jsonl": "{}:{}", ".json": "{}, record {}", **dict.fromkeys(COLUMNAR, "{}, row {}")}
_SURROGATES = re.compile("[\ud800-\udfff]")


def read_texts(
    files: Iterable[TextFile], text_key: str, whole_file: bool = False, bad: BadRows | None = None
) -> Iterator[str]:
    """Yield the text samples of ``files`` in order, except blank ones.

    Args:
        files: Files of texts.
        text_key: Key of the text in a record.
        whole_file: Yield each .txt file as one sample, instead of one sample per line.
        bad: Counter of bad rows, by default one that raises an error at the first.

    Raises:
        DataError: A file cannot be read, or a row is bad and is not skipped.
    """
    bad = bad or BadRows()
    for file in files:
        if file.format == ".txt":
            with checking(file, bad):
                yield from _whole_text(file, bad) if whole_file else _text_lines(file, bad)
            continue
        for where, record in read_records([file], [text_key], bad, TODO):
            if text := text_of(record, text_key, where, bad):
                yield text


def read_records(
    files: Iterable[TextFile], keys: Sequence[str], bad: BadRows, todo: str
) -> Iterator[tuple[Callable[[], str], object]]:
    """Yield the records of ``files`` in order, each with a function that returns its place.

    Args:
        files: Files of records, of any format but .txt.
        keys: Columns to read of files that have columns; those that a file lacks are left out.
        bad: Counter of bad rows.
        todo: Advice in the error about a wrong column.

    Raises:
        DataError: A file cannot be read, or a row is bad and is not skipped.
    """
    for file in files:
        with checking(file, bad):
            for row, record in _records(file, keys, bad, todo):
                yield partial(place, file, row), record


def text_of(
    record: object, key: str, where: Callable[[], str], bad: BadRows, todo: str = TODO, default: str | None = None
) -> str | None:
    """Return the text at ``key`` of a record, or None if the row has to be left out.

    Args:
        record: Content of a row.
        key: Key of the text.
        where: Function that returns the place of the row.
        bad: Counter of rows that are skipped, null or blank, or whose text contains lone surrogates.
        todo: Advice in the error about a wrong key.
        default: Text of a record without ``key``, or with null there. None: the text must be there and not blank.

    Raises:
        DataError: The row is bad and is not skipped.
    """
    if not isinstance(record, dict):
        message = f"expected a JSON object, got {type(record).__name__}"
        bad.skip("no JSON object", Problem(where(), message, f'Write each row as {{"{key}": "..."}}'))
        return None
    text = record.get(key)
    # Data sets write a missing input as an absent key, as null or as an empty text.
    if text is None and default is not None:
        return default
    if text is None and key not in record:
        bad.skip(f"no key '{key}'", no_such_key(where(), key, record, todo))
        return None
    if text is None or (isinstance(text, str) and default is None and (not text or text.isspace())):
        bad.note(f"{'null' if text is None else 'blank'} text, left out", where())
        return None
    if not isinstance(text, str):
        message = f"expected a string at key '{key}', got {type(text).__name__}"
        bad.skip("no string", Problem(where(), message, todo))
        return None
    return without_surrogates(text, where, bad)


def without_surrogates(text: str, where: Callable[[], str], bad: BadRows) -> str:
    """Replace lone surrogates, which JSON can express but no tokenizer encodes, by U+FFFD, and count the row."""
    try:
        text.encode()
    except UnicodeEncodeError:
        bad.replace("lone surrogates, replaced by U+FFFD", where())
        return _SURROGATES.sub("\ufffd", text)
    return text


def place(file: TextFile, row: int) -> str:
    """Return the place of a row in a file, for messages."""
    return _PLACE[file.format].format(file.path, row)


def _records(file: TextFile, keys: Sequence[str], bad: BadRows, todo: str) -> Records:
    if file.format in COLUMNAR:
        return column_records(file, keys, bad, todo)
    return _json_lines(file, bad) if file.format == ".jsonl" else _json_list(file, bad)


def _json_lines(file: TextFile, bad: BadRows) -> Records:
    with open_file(file) as stream:
        # Binary lines end at \n only. Text mode would also split at a lone \r, and str.splitlines at U+2028, which JSON
        # strings may contain.
        for row, line in enumerate(stream, 1):
            text = _decode(line, file, row, bad)
            if text is None or not text or text.isspace():
                continue
            try:
                yield row, json.loads(text)
            except (ValueError, RecursionError) as error:
                _invalid_json(place(file, row), error, bad)


def _json_list(file: TextFile, bad: BadRows) -> Records:
    """Yield the records of a JSON list, or a single record."""
    with open_file(file) as stream:
        text = _decode(stream.read(), file, None, bad)
    if text is None:
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        _invalid_json(str(file.path), error, bad)
        return
    yield from enumerate(content if isinstance(content, list) else [content])


def _invalid_json(where: str, error: Exception, bad: BadRows) -> None:
    todo = "Correct its syntax; a file with one record per line needs the suffix .jsonl"
    bad.skip("invalid JSON", Problem(where, f"is not valid JSON ({error})", todo), error)


def _text_lines(file: TextFile, bad: BadRows) -> Iterator[str]:
    with open_file(file) as stream:
        for row, line in enumerate(stream, 1):
            text = _decode(line, file, row, bad)
            if text and not text.isspace():
                yield text.rstrip("\r\n")


def _whole_text(file: TextFile, bad: BadRows) -> Iterator[str]:
    with open_file(file) as stream:
        text = _decode(stream.read(), file, None, bad)
    if text and not text.isspace():
        yield text
    elif text is not None:
        bad.note("blank text, left out", str(file.path))


def _decode(data: bytes, file: TextFile, row: int | None, bad: BadRows) -> str | None:
    """Decode a line, or a whole file if ``row`` is None; return None if it is skipped."""
    try:
        return data.decode("utf-8-sig")  # drops the byte-order mark that some editors write
    except UnicodeDecodeError as error:
        where = str(file.path) if row is None else place(file, row)
        problem = Problem(where, f"is not valid UTF-8 ({error.reason})", "Convert the file to UTF-8")
        bad.skip("invalid UTF-8", problem, error)
        return None
