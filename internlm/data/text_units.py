"""Units of text files: the pieces of files that can be read without what is before them.

A unit is a range of rows of a Parquet row group or an Arrow record batch, a range of bytes of a file of lines, or, of a
file that can only be read from its beginning, every k-th of its documents. Units are dealt to shards as a whole, so
large ones are divided where there are few.

Shapes: U units.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from internlm.data.text_folder import THREADS, TextFile
from internlm.utils.errors import DataError, Problem

#: Units for each shard in an epoch, if the files can be divided into so many: with fewer, shards would differ more in
#: what they read of an epoch.
UNITS_PER_SHARD = 4
#: Bytes of a unit of lines: at most so many, unless this makes more units than the limit.
UNIT_BYTES, MOST_UNITS = 1 << 22, 1 << 18
#: Smallest and largest size at which units are divided further.
LEAST_BYTES = 1 << 8
#: Limit of the number of units into which one row group or one compressed file is divided. Each of them reads the
#: file from its beginning, which is still much faster than tokenizing.
MOST_PARTS = 64
CORRUPT = "Restore the file from its source"


class Access(IntEnum):
    """Way in which the texts of a file are read, by its format and compression."""

    PARQUET = 0
    ARROW = 1  # record batches at known places
    LINES = 2  # plain lines
    SEQUENTIAL = 3  # compressed lines, one JSON list, or an Arrow stream with dictionaries


class Block(NamedTuple):
    """Row group or record batch of a file; of other files, the whole file."""

    place: int  # index of the row group; index or byte offset of the record batch
    rows: int  # 0: unknown
    size: int  # bytes


class Unit(NamedTuple):
    """Unit of a file.

    Lines that start in bytes [``begin``, ``stop``), rows [``begin``, ``stop``) of block ``place``, or, of a sequential
    file, the documents with index ``begin`` modulo ``stop``.
    """

    file: int
    place: int
    begin: int
    stop: int


def read_layout(file: TextFile, column: str) -> tuple[Access, list[Block]]:
    """Return how a file is read, and its blocks; texts are not read.

    Raises:
        DataError: The file is damaged, or has no column of strings with this name.
    """
    file.check_unchanged()
    try:
        if file.format == "parquet":
            return Access.PARQUET, _row_groups(file, column)
        if file.format == "arrow":
            return _record_batches(file, column)
        whole = [Block(0, 0, file.size)]
        if file.compression or (file.path.suffix.lower() == ".json" and not _is_json_lines(file)):
            return Access.SEQUENTIAL, whole
        return Access.LINES, whole
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        message = f"cannot be read as {file.format} ({str(error).partition(chr(10))[0]})"
        raise DataError(Problem(str(file.path), message, CORRUPT)) from error


def divide(layouts: list[tuple[Access, list[Block]]], shards: int) -> np.ndarray:
    """Divide the blocks of files into units, at least :data:`UNITS_PER_SHARD` for each shard where this is possible.

    Returns:
        Units in the order of files and their content, int64 [U, 4]: the columns of :class:`Unit`.
    """
    # From sizes alone, and never from the number of ranks: the units determine the order of the documents.
    total = sum(block.size for _, blocks in layouts for block in blocks)
    target = max(total // (UNITS_PER_SHARD * shards), LEAST_BYTES)
    line_bytes = min(target, max(UNIT_BYTES, total // MOST_UNITS))
    units = [
        (file, *unit)
        for file, (access, blocks) in enumerate(layouts)
        for block in blocks
        for unit in _divided(access, block, line_bytes if access is Access.LINES else target)
    ]
    return np.array(units, np.int64).reshape(-1, len(Unit._fields))


def read_layouts(files: list[TextFile], column: str) -> list[tuple[Access, list[Block]]]:
    """Return :func:`read_layout` of each file, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read_layout, files, itertools.repeat(column)))


def _divided(access: Access, block: Block, target: int) -> Iterator[tuple[int, int, int]]:
    """Yield place, begin and stop of units of about ``target`` bytes."""
    if access is Access.LINES:
        for begin in range(0, block.size, target):
            yield 0, begin, min(begin + target, block.size)
        return
    parts = min(-(-block.size // target), MOST_PARTS)
    if access is Access.SEQUENTIAL:
        # Every k-th document rather than ranges: how many documents the file has is not known before it is read.
        yield from ((0, part, parts) for part in range(parts))
        return
    parts = min(parts, block.rows)
    for part in range(parts):
        yield block.place, block.rows * part // parts, block.rows * (part + 1) // parts


# -- layouts ----------------------------------------------------------------------------------------------------------


def _is_json_lines(file: TextFile) -> bool:
    """Return whether a .json file has one record per line, as many datasets have, rather than one list of records."""
    with file.path.open("rb") as stream:
        line = stream.readline(UNIT_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
        while not line and stream.tell() < file.size:
            line = stream.readline(UNIT_BYTES).strip()
    if not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return len(line) >= UNIT_BYTES - 1  # a long line that was cut; otherwise one record over several lines
    return True


def _row_groups(file: TextFile, column: str) -> list[Block]:
    with pq.ParquetFile(file.path) as parquet:
        check_column(file, column, parquet.schema_arrow)
        metadata = parquet.metadata
        names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        index = names.index(column)
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        sizes = [group.column(index).total_uncompressed_size for group in groups]
    return [Block(place, group.num_rows, size) for place, (group, size) in enumerate(zip(groups, sizes, strict=True))]


def _record_batches(file: TextFile, column: str) -> tuple[Access, list[Block]]:
    # Mapped, so that the texts between the headers are not read. The map ends here: if a mapped file is truncated, the
    # process is killed.
    with pa.memory_map(str(file.path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            check_column(file, column, reader.schema)
            rows = [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]
            size = file.size // max(len(rows), 1)
            return Access.ARROW, [Block(index, count, size) for index, count in enumerate(rows)]
        source.seek(0)
        schema = pa.ipc.read_schema(pa.ipc.read_message(source))
        check_column(file, column, schema)
        if any(pa.types.is_dictionary(field.type) for field in schema):
            return Access.SEQUENTIAL, [Block(0, 0, file.size)]
        blocks: list[Block] = []
        while source.tell() < file.size:
            place = source.tell()
            try:
                message = pa.ipc.read_message(source)
            except EOFError:  # the mark of the end
                break
            rows_of_batch = pa.ipc.read_record_batch(message, schema).num_rows
            blocks.append(Block(place, rows_of_batch, source.tell() - place))
    return Access.ARROW, blocks


def check_column(file: TextFile, column: str, schema: pa.Schema) -> None:
    """Check that a schema has a column of strings.

    Raises:
        DataError: It has not.
    """
    todo = "Set data.content_name to the name of the column that holds the text"
    if column not in schema.names:
        message = f"has no column {column!r}, only {', '.join(map(repr, schema.names))}"
        raise DataError(Problem(str(file.path), message, todo))
    kind: Any = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        if pa.types.is_null(kind):
            return  # a file of nulls alone
        raise DataError(Problem(str(file.path), f"expected strings in column {column!r}, got {kind}", todo))
