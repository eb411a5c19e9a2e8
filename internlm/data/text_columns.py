"""Readers of text columns from .parquet files and from .arrow files, both of the file and of the stream format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from internlm.data.bad_rows import BadRows
from internlm.data.text_files import DamagedFileError, TextFile, no_such_key
from internlm.utils.errors import Problem
from internlm.utils.lazy import require

#: Rows that are decoded at once: a file may be larger than memory.
BATCH_ROWS = 1024

#: Index of a row in its file, and its texts by column.
Row: TypeAlias = tuple[int, dict[str, str | None]]


def column_records(file: TextFile, keys: Sequence[str], bad: BadRows, todo: str) -> Iterator[Row]:
    """Yield each row of ``file`` with its index, as a dict of the columns ``keys`` that the file has.

    Args:
        file: A .parquet or .arrow file.
        keys: Names of columns. Each must hold strings, of any Arrow type, which may be dictionary-encoded.
        bad: Counter of bad rows.
        todo: Advice in the error about a wrong column.

    Raises:
        DataError: A column holds no strings, or a string is not UTF-8, and this is not skipped.
        OSError, DamagedFileError: The file cannot be read, or is damaged.
    """
    pyarrow = require("pyarrow", str(file.path), "pip install pyarrow")
    read_batches = _parquet_batches if file.format == ".parquet" else _arrow_batches
    start = 0
    try:
        with read_batches(file, keys) as (schema, batches):
            names = [key for key in keys if key in schema.names]
            if not names:
                where = str(file.path)
                bad.skip(f"no column '{keys[0]}'", no_such_key(where, keys[0], schema.names, todo))
                return
            if problem := _no_strings(file, schema, names, todo):
                bad.skip("no strings", problem)
                return
            for batch in batches:
                for begin in range(0, len(batch), BATCH_ROWS):
                    yield from _rows(file, batch.select(names).slice(begin, BATCH_ROWS), start + begin, bad)
                start += len(batch)
    # Names of columns are decoded without being checked; of texts that are no UTF-8, the rows themselves tell.
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DamagedFileError(str(error)) from error


@contextmanager
def _parquet_batches(file: TextFile, keys: Sequence[str]) -> Iterator[tuple[Any, Iterator[Any]]]:
    parquet = require("pyarrow.parquet", str(file.path), "pip install pyarrow")
    with parquet.ParquetFile(file.path) as table:
        names = [key for key in keys if key in table.schema_arrow.names]
        yield table.schema_arrow, table.iter_batches(BATCH_ROWS, columns=names)


@contextmanager
def _arrow_batches(file: TextFile, keys: Sequence[str]) -> Iterator[tuple[Any, Iterator[Any]]]:
    pyarrow = require("pyarrow", str(file.path), "pip install pyarrow")

    def checked(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            # Unlike the reader of Parquet, this one accepts offsets beyond the end of the data.
            batch.select([key for key in keys if key in batch.schema.names]).validate(full=True)
            yield batch

    # Not a memory map: a file that is truncated while it is mapped kills the process.
    with pyarrow.OSFile(str(file.path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            yield stream.schema, checked(stream)
        else:
            yield reader.schema, checked(map(reader.get_batch, range(reader.num_record_batches)))


def _no_strings(file: TextFile, schema: Any, names: Sequence[str], todo: str) -> Problem | None:
    types = require("pyarrow.types", str(file.path), "pip install pyarrow")
    for name in names:
        column_type = value_type = schema.field(name).type
        if types.is_dictionary(column_type):
            value_type = column_type.value_type
        # A column in which every value is null may have the type null.
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(is_type(value_type) for is_type in tests):
            message = f"expected strings in column '{name}', got {column_type}"
            return Problem(str(file.path), message, todo)
    return None


def _rows(file: TextFile, batch: Any, start: int, bad: BadRows) -> Iterator[Row]:
    names, columns = batch.schema.names, batch.columns
    try:
        values = [column.to_pylist() for column in columns]
    except UnicodeDecodeError:
        # In one of the rows: find it. Arrow converts columns without checking that their strings are valid.
        for index in range(len(batch)):
            try:
                row = {name: column[index].as_py() for name, column in zip(names, columns, strict=True)}
            except UnicodeDecodeError as error:
                where = f"{file.path}, row {start + index}"
                problem = Problem(where, f"is not valid UTF-8 ({error.reason})", "Convert the texts to UTF-8")
                bad.skip("invalid UTF-8", problem, error)
            else:
                yield start + index, row
        return
    for index, row_values in enumerate(zip(*values, strict=True), start):
        yield index, dict(zip(names, row_values, strict=True))
