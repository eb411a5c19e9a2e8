"""Reader of documents: the texts of a unit of a dataset folder, from any document of the unit on.

Rows that have no text are left out, and counted.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pyarrow as pa

from internlm.data.bad_rows import PLACES, BadRows, OnError
from internlm.data.provenance import Origin
from internlm.data.text_folder import TextFile
from internlm.data.text_rows import START, Content, raw_rows
from internlm.data.text_units import CORRUPT, Access, Unit, read_layouts
from internlm.utils.errors import DataError, Problem

#: Kinds of rows that are no errors, as they are counted.
BLANK, SURROGATE = "without text", "half of a surrogate pair, replaced by U+FFFD"


class Document(NamedTuple):
    """Text with its cursor, and that of what follows it."""

    next: int
    text: str
    cursor: int


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
            for after, raw, place in raw_rows(file, access, self.column, unit, cursor):
                with self._lock:
                    self.counts["rows"] += 1
                text = self._text(unit, raw, place)
                if text is not None:
                    yield Document(after, text, place)

    def origin(self, unit: Unit, document: Document) -> Origin:
        """Return where a document of a unit is stored."""
        path = str(self.files[unit.file].path)
        if self.layouts[unit.file][0] is Access.LINES:
            size = document.next - document.cursor
            return Origin(path, self._row(unit, document.cursor), document.cursor, size)
        return Origin(path, self._row(unit, document.cursor))

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
            first = next(raw_rows(self.files[file], access, self.column, unit, START), None)
        if first is None:
            return False
        with suppress(BadRowError):
            record = _record(first[1])
            if self.column not in record:
                message, todo = _no_such_key(self.column, record), "Set data.content_name to the key of the text"
                raise DataError(Problem(self._where(unit, first[2]), message, todo))
        return True

    def _text(self, unit: Unit, raw: Content, cursor: int) -> str | None:
        """Return the text of a row; None if it is left out."""
        file_format = self.files[unit.file].format
        try:
            if raw is None:
                text = None
            elif file_format == "json":
                text = _text_of(_record(raw), self.column)
            else:
                text = _decode(raw, file_format == "text")
        except BadRowError as error:
            where = self._counted_where(f"{error.kind}, skipped", unit, cursor)
            todo = "Correct the row, or set data.on_bad_row = 'skip'"
            self.bad_rows.skip(error.kind, Problem(where, str(error), todo), error)
            return None
        if text is None or not text or text.isspace():
            self.bad_rows.note(BLANK, self._counted_where(BLANK, unit, cursor))
            return None
        if file_format == "json" and not _is_encodable(text):
            self.bad_rows.replace(SURROGATE, self._counted_where(SURROGATE, unit, cursor))
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _counted_where(self, kind: str, unit: Unit, cursor: int) -> str:
        """Return the place of a row; only its file if the place would not be kept, since lines have to be counted."""
        if self.bad_rows.count(kind) > PLACES:
            return str(self.files[unit.file].path)
        return self._where(unit, cursor)

    def _where(self, unit: Unit, cursor: int) -> str:
        return f"{self.files[unit.file].path}:{self._row(unit, cursor) + 1}"

    def _row(self, unit: Unit, cursor: int) -> int:
        """Return the index of a row in its file."""
        file, (access, blocks) = self.files[unit.file], self.layouts[unit.file]
        if access is Access.SEQUENTIAL:
            return cursor
        if access is Access.LINES:
            return _count_lines(file, cursor)
        return cursor + sum(block.rows for block in blocks if block.place < unit.place)


@contextmanager
def _naming_damage(file: TextFile) -> Iterator[None]:
    """Convert an error of reading a file into one that names it, and says whether the file has changed.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
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


def _count_lines(file: TextFile, offset: int) -> int:
    """Return the number of lines before a byte offset."""
    lines = 0
    with file.path.open("rb") as stream:
        while offset > 0 and (data := stream.read(min(offset, 1 << 20))):
            lines += data.count(b"\n")
            offset -= len(data)
    return lines
