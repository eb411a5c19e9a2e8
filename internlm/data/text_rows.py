"""Raw rows of text files: what a unit of a file holds, from any row of the unit on, before it is decoded.

A *cursor* is the place of a row in its unit: its index in the row group, record batch or sequential file, or the offset
of its line. Errors of the system and of pyarrow are raised as they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from internlm.data.text_folder import TextFile
from internlm.data.text_units import Access, Unit, check_column
from internlm.utils.errors import DataError, Problem

START = -1  # cursor before the first row of a unit
LONGEST_LINE = 1 << 28  # bytes
LARGEST_LIST = 1 << 30  # bytes of a file that is one JSON list
PARQUET_BUFFER = 1 << 20  # bytes
BATCH_ROWS = 256  # converted to Python objects at once

#: Raw content of a row: bytes to be decoded, a record of a JSON list, or None for a blank row.
Content: TypeAlias = Any
#: Cursor after a row, its content, and its own cursor.
RawRow: TypeAlias = tuple[int, Content, int]


def raw_rows(file: TextFile, access: Access, column: str, unit: Unit, cursor: int) -> Iterator[RawRow]:
    """Yield the rows of a unit from ``cursor`` on.

    Args:
        file: File of the unit.
        access: How the file is read.
        column: Name of the column of the text.
        unit: Unit of the file.
        cursor: Cursor of the first row, or :data:`START`.

    Raises:
        DataError: A line or a JSON list is too long, or a list is not valid JSON.
        OSError, EOFError, zlib.error, pyarrow.ArrowException: The file cannot be read.
    """
    # One function for each way of access, which alone knows what a cursor is.
    readers: dict[Access, Callable[[TextFile, str, Unit, int], Iterator[RawRow]]] = {
        Access.PARQUET: _parquet_rows,
        Access.ARROW: _batch_rows,
        Access.LINES: _line_rows,
        Access.SEQUENTIAL: _sequential_rows,
    }
    return readers[access](file, column, unit, cursor)


def _parquet_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[RawRow]:
    # Buffered page by page: by default the column of a whole row group is loaded, for each of the shards of a rank.
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=PARQUET_BUFFER) as parquet:
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=[unit.place], columns=[column], use_threads=False)
        first = 0
        for batch in batches:
            begin = max(unit.begin, cursor)
            yield from _array_rows(batch.column(0), first, begin, unit.stop)
            first += batch.num_rows
            if first >= unit.stop:
                return


def _batch_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[RawRow]:
    with pa.OSFile(str(file.path), "rb") as source:
        if source.read(6) == b"ARROW1":
            batch = pa.ipc.open_file(source).get_batch(unit.place)
        else:
            source.seek(0)
            schema = pa.ipc.read_schema(pa.ipc.read_message(source))
            source.seek(unit.place)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
    yield from _array_rows(_checked(batch, column), 0, max(unit.begin, cursor), unit.stop)


def _checked(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Return a column of a record batch, whose offsets are checked: with damaged ones, Arrow would crash.

    Invalid UTF-8 is no damage of the file, so strings are checked as bytes.
    """
    array: Any = batch.column(batch.schema.names.index(column))
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    (array.view(as_bytes[array.type]) if array.type in as_bytes else array).validate(full=True)
    return array


def _array_rows(array: pa.Array, first: int, begin: int, stop: int) -> Iterator[RawRow]:
    """Yield rows [``begin``, ``stop``) of an array whose first row is ``first``, a slice at a time."""
    for row in range(max(begin, first), min(stop, first + len(array)), BATCH_ROWS):
        rows = array.slice(row - first, min(BATCH_ROWS, stop - row))
        # Bytes, since invalid UTF-8 would make the conversion of the other rows fail, too.
        texts = rows.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        yield from ((index + 1, text, index) for index, text in enumerate(texts, row))


def _line_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[RawRow]:
    with file.path.open("rb") as stream:
        begin = max(unit.begin, cursor)
        if cursor == START and begin:
            # The line at `begin` belongs to this unit if it starts there, that is, if a line ends before.
            stream.seek(begin - 1)
            begin += len(stream.readline(unit.stop - begin + 1)) - 1
        else:
            stream.seek(begin)
        while begin < unit.stop and (line := stream.readline(LONGEST_LINE)):
            offset, begin = begin, begin + len(line)
            if len(line) == LONGEST_LINE:
                raise _too_long(file, "a line", LONGEST_LINE)
            yield begin, _stripped(line), offset


def _sequential_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[RawRow]:
    begin, parts = max(unit.begin, cursor), unit.stop
    for index, raw in enumerate(_all_rows(file, column)):
        if index >= begin and index % parts == unit.begin:
            yield index + 1, raw, index


def _all_rows(file: TextFile, column: str) -> Iterable[Content]:
    if file.format == "arrow":
        return _streamed_rows(file, column)
    if file.format == "json" and not _names_lines(file):
        return _listed_rows(file)
    return _compressed_lines(file)


def _streamed_rows(file: TextFile, column: str) -> Iterator[bytes | None]:
    with pa.OSFile(str(file.path), "rb") as source, pa.ipc.open_stream(source) as batches:
        check_column(file, column, batches.schema)
        for batch in batches:
            array = _checked(batch, column)
            yield from (raw for _, raw, _ in _array_rows(array, 0, 0, len(array)))


def _names_lines(file: TextFile) -> bool:
    """Return whether a compressed file has one record per line, by its name."""
    return not file.name.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").endswith(".json")


def _compressed_lines(file: TextFile) -> Iterator[bytes | None]:
    with _open(file) as stream:
        while line := stream.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise _too_long(file, "a line", LONGEST_LINE)
            yield _stripped(line)


def _listed_rows(file: TextFile) -> Iterator[Content]:
    """Yield the records of one JSON list, of a single JSON record, or of a compressed file with one record per line."""
    with _open(file) as stream:
        content = stream.read(LARGEST_LIST + 1)
    if len(content) > LARGEST_LIST:
        raise _too_long(file, "a JSON list", LARGEST_LIST)
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"{" and file.compression:
            yield from map(_stripped, io.BytesIO(content))
            return
        todo = "Correct its syntax; a file with one record per line needs the suffix .jsonl"
        raise DataError(Problem(str(file.path), f"is not valid JSON ({error})", todo)) from error
    yield from records if isinstance(records, list) else [records]


def _open(file: TextFile) -> Any:
    """Open a file for reading, decompressed."""
    if file.compression == "zstd":
        source: Any = pa.input_stream(str(file.path), compression="zstd")
        return io.BufferedReader(source)
    openers: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bz2": bz2.open, "": open}
    return openers[file.compression](file.path, "rb")


def _stripped(line: bytes) -> bytes | None:
    """Return a line without its end; None for a blank one."""
    line = line.rstrip(b"\r\n")
    return line if line.strip() else None


def _too_long(file: TextFile, thing: str, limit: int) -> DataError:
    return DataError(Problem(str(file.path), f"contains {thing} of more than {limit} bytes", "Split it"))
