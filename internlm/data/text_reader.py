"""Reader of documents: the texts of a unit of a dataset folder, from any document of the unit on.

A *cursor* is the place of a document in its unit: its row, the offset of its line, or its index in a sequential file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from internlm.data.bad_rows import PLACES, BadRows, OnError
from internlm.data.text_folder import TextFile
from internlm.data.text_units import CORRUPT, Access, Unit, check_column, read_layouts
from internlm.utils.errors import DataError, Problem

START = -1  # cursor before the first document of a unit
#: Kinds of rows that are no errors, as they are counted.
BLANK, SURROGATE = "without text", "half of a surrogate pair, replaced by U+FFFD"
LONGEST_LINE = 1 << 28  # bytes
LARGEST_LIST = 1 << 30  # bytes of a file that is one JSON list
BATCH_ROWS = 256  # converted to Python objects at once

#: Raw content of a row: bytes to be decoded, a record of a JSON list, or None for a blank row.
_Content: TypeAlias = Any
#: Cursor after a row, its content, and its place for errors.
_Raw: TypeAlias = tuple[int, _Content, int]


class Document(NamedTuple):
    """Text with the cursor of what follows it."""

    next: int
    text: str


class BadRowError(ValueError):
    """Error for a row without a usable text."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TextReader:
    """Reader of the documents of text files.

    Rows with an empty or missing text are left out and counted. Half of a surrogate pair, which JSON can escape and no
    tokenizer accepts, is replaced by U+FFFD.

    Args:
        files: Text files.
        column: Name of the column or key of the text.
        on_bad_row: Whether a row that cannot be read, such as invalid JSON, is an error or is left out and counted.

    Raises:
        DataError: A file is damaged, or has no such column.
    """

    def __init__(self, files: list[TextFile], column: str, on_bad_row: OnError) -> None:
        self.files, self.column = files, column
        self.layouts = read_layouts(files, column)
        self.bad_rows = BadRows(on_bad_row)
        #: Units and rows that were read; repeated ones count again.
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the counts: threads read ahead

    def read(self, unit: Unit, cursor: int = START) -> Iterator[Document]:
        """Yield the documents of a unit from ``cursor`` on.

        Raises:
            DataError: The file has changed or is damaged, or a row is bad and bad rows are errors.
        """
        file = self.files[unit.file]
        access = self.layouts[unit.file][0]
        file.check_unchanged()
        with self._lock:
            self.counts["units"] += 1
        with _naming_damage(file):
            for after, raw, place in _READERS[access](file, self.column, unit, cursor):
                with self._lock:
                    self.counts["rows"] += 1
                text = self._text(file, access, raw, place)
                if text is not None:
                    yield Document(after, text)

    def check_first_row(self, file: int) -> bool:
        """Check that the first row of a file has the column; return False if the file has no row.

        Raises:
            DataError: It has no such column, which is an error even if bad rows are left out.
        """
        access, blocks = self.layouts[file]
        if access in (Access.PARQUET, Access.ARROW) or self.files[file].format != "json":
            return bool(blocks)  # the column was checked when the file was opened
        unit = Unit(file, 0, 0, self.files[file].size if access is Access.LINES else 1)
        with _naming_damage(self.files[file]):
            first = next(_READERS[access](self.files[file], self.column, unit, START), None)
        if first is None:
            return False
        with suppress(BadRowError):
            record = _record(first[1])
            if self.column not in record:
                message, todo = _no_such_key(self.column, record), "Set data.content_name to the key of the text"
                raise DataError(Problem(_where(self.files[file], access, first[2]), message, todo))
        return True

    def _text(self, file: TextFile, access: Access, raw: _Content, place: int) -> str | None:
        """Return the text of a row; None if it is left out."""
        try:
            if raw is None:
                text = None
            elif file.format == "json":
                text = _text_of(_record(raw), self.column)
            else:
                text = _decode(raw, file.format == "text")
        except BadRowError as error:
            where = self._where(f"{error.kind}, skipped", file, access, place)
            todo = "Correct the row, or set data.on_bad_row = 'skip'"
            self.bad_rows.skip(error.kind, Problem(where, str(error), todo), error)
            return None
        if text is None or not text or text.isspace():
            self.bad_rows.note(BLANK, self._where(BLANK, file, access, place))
            return None
        if file.format == "json" and not _is_encodable(text):
            self.bad_rows.replace(SURROGATE, self._where(SURROGATE, file, access, place))
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _where(self, kind: str, file: TextFile, access: Access, place: int) -> str:
        """Return the place of a row; without the number of its line if the place is only counted."""
        return str(file.path) if self.bad_rows.count(kind) > PLACES else _where(file, access, place)


@contextmanager
def _naming_damage(file: TextFile) -> Iterator[None]:
    """Convert an error of reading a file into one that names it, and says whether the file has changed.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        file.check_unchanged()
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(Problem(str(file.path), f"cannot be read ({reason})", CORRUPT)) from error


# -- texts ------------------------------------------------------------------------------------------------------------


def _decode(data: bytes, has_mark: bool = True) -> str:
    try:
        # Drops the byte-order mark that some editors write at the beginning of a file.
        return data.decode("utf-8-sig" if has_mark else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError("invalid UTF-8", f"is not valid UTF-8 ({error.reason})") from error


def _record(raw: object) -> dict[str, Any]:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(_decode(raw))
        except (ValueError, RecursionError) as error:
            if isinstance(error, BadRowError):
                raise
            raise BadRowError("invalid JSON", f"is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise BadRowError("no record", f"expected a JSON object, got {type(raw).__name__}")
    return raw


def _text_of(record: dict[str, Any], column: str) -> str | None:
    if column not in record:
        raise BadRowError("no text", _no_such_key(column, record))
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise BadRowError("no string", f"expected a string at key {column!r}, got {type(text).__name__}")
    return text


def _no_such_key(column: str, record: dict[str, Any]) -> str:
    known = ", ".join(map(repr, record)) or "nothing"
    return f"has no key {column!r} (data.content_name), only {known}"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _where(file: TextFile, access: Access, place: int) -> str:
    """Return the file and the row, counted from 1, of a row's index or, in a file of lines, of its byte offset."""
    if access is not Access.LINES:
        return f"{file.path}:{place + 1}"
    lines, offset = 1, place
    with file.path.open("rb") as stream:
        while offset > 0 and (data := stream.read(min(offset, 1 << 20))):
            lines += data.count(b"\n")
            offset -= len(data)
    return f"{file.path}:{lines}"


# -- raw rows ---------------------------------------------------------------------------------------------------------


def _parquet_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[_Raw]:
    with pq.ParquetFile(file.path) as parquet:
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=[unit.place], columns=[column], use_threads=False)
        first = 0
        for batch in batches:
            begin = max(unit.begin, cursor)
            yield from _array_rows(batch.column(0), first, begin, unit.stop)
            first += batch.num_rows
            if first >= unit.stop:
                return


def _batch_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[_Raw]:
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


def _array_rows(array: pa.Array, first: int, begin: int, stop: int) -> Iterator[_Raw]:
    """Yield rows [``begin``, ``stop``) of an array whose first row is ``first``, a slice at a time."""
    for row in range(max(begin, first), min(stop, first + len(array)), BATCH_ROWS):
        rows = array.slice(row - first, min(BATCH_ROWS, stop - row))
        # Bytes, since invalid UTF-8 would make the conversion of the other rows fail, too.
        texts = rows.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        yield from ((index + 1, text, index) for index, text in enumerate(texts, row))


def _line_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[_Raw]:
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


def _sequential_rows(file: TextFile, column: str, unit: Unit, cursor: int) -> Iterator[_Raw]:
    begin, parts = max(unit.begin, cursor), unit.stop
    for index, raw in enumerate(_all_rows(file, column)):
        if index >= begin and index % parts == unit.begin:
            yield index + 1, raw, index


def _all_rows(file: TextFile, column: str) -> Iterable[_Content]:
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
    """Return whether the name of a compressed file says that it has one record per line."""
    return not file.name.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").endswith(".json")


def _compressed_lines(file: TextFile) -> Iterator[bytes | None]:
    with _open(file) as stream:
        while line := stream.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise _too_long(file, "a line", LONGEST_LINE)
            yield _stripped(line)


def _listed_rows(file: TextFile) -> Iterator[_Content]:
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


_READERS: dict[Access, Callable[[TextFile, str, Unit, int], Iterator[_Raw]]] = {
    Access.PARQUET: _parquet_rows,
    Access.ARROW: _batch_rows,
    Access.LINES: _line_rows,
    Access.SEQUENTIAL: _sequential_rows,
}
