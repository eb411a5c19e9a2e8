"""Files of texts: found in folders by suffix, and opened, decompressed if needed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from internlm.data.bad_rows import BadRows
from internlm.utils.errors import DataError, Problem
from internlm.utils.lazy import require

#: Suffixes of formats that are read line by line or as a whole, and may be compressed.
PLAIN = (".txt", ".jsonl", ".json")
#: Suffixes of formats with columns, which have a compression of their own.
COLUMNAR = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
#: Formats of records, rather than of plain text.
RECORDS = (".jsonl", ".json", *COLUMNAR)
#: Keys of a record that an error lists.
LISTED_KEYS = 10


class DamagedFileError(Exception):
    """Error in the content of a file, such as an end that is missing."""


class TextFile(NamedTuple):
    """File of texts, and what its name says about its content."""

    path: Path
    format: str  # a suffix of PLAIN or COLUMNAR
    compression: str  # a suffix of COMPRESSED, or ""


class FoundFiles(NamedTuple):
    """Files of texts, and what else the searched folders contain."""

    files: list[TextFile]
    left_out: list[Path]


def find_texts(paths: Iterable[str], formats: Sequence[str] = (*PLAIN, *COLUMNAR)) -> FoundFiles:
    """Expand paths of files and folders to a list of text files.

    Args:
        paths: Files, and folders that are searched at any depth; links to folders are not followed.
        formats: Supported formats.

    Returns:
        The files in the order of ``paths``, where those of a folder are sorted; and the other files of the folders.

    Raises:
        DataError: A path does not exist, a folder contains no text file, or a file type is not supported.
    """
    known = ", ".join(name + "[.gz|.zst]" if name in PLAIN else name for name in formats)
    found: list[TextFile] = []
    left_out: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            # Links to folders are not followed, since they may form a circle, but they are listed as left out.
            inside = [entry for entry in sorted(path.rglob("*")) if entry.is_symlink() or not entry.is_dir()]
            files = [text_file(entry, formats) if entry.is_file() else None for entry in inside]
            if not any(files):
                message = f"contains no text file (supported: {known})"
                raise DataError(Problem(str(path), message, "Pass text files or their folder as --text_input_path"))
            found += [file for file in files if file]
            left_out += [entry for entry, file in zip(inside, files, strict=True) if not file]
        elif not path.is_file():
            todo = "Pass existing files or folders as --text_input_path"
            raise DataError(Problem(str(path), "no such file or folder", todo))
        elif file := text_file(path, formats):
            found.append(file)
        else:
            message = f"file type {path.suffix!r} is not supported (supported: {known})"
            raise DataError(Problem(str(path), message, "Convert the file, or correct its suffix"))
    return FoundFiles(found, left_out)


def text_file(path: Path, formats: Sequence[str] = (*PLAIN, *COLUMNAR)) -> TextFile | None:
    """Return the format and compression of a file by its suffixes, in any case; None: it has none of ``formats``."""
    # Not the first suffix: names such as part-0.2024.jsonl.gz have more.
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in COMPRESSED and before in PLAIN:
        return TextFile(path, before, last) if before in formats else None
    return TextFile(path, last, "") if last in formats else None


@contextmanager
def open_file(file: TextFile) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, which are decompressed."""
    if file.compression == ".gz":
        with gzip.open(file.path) as unzipped:
            yield cast("BinaryIO", unzipped)
    elif file.compression == ".zst":
        # Python's library reads zstd only from version 3.14 on; Arrow brings a decompressor.
        pyarrow = require("pyarrow", str(file.path), "pip install pyarrow")
        with pyarrow.input_stream(str(file.path), compression="zstd", buffer_size=1 << 20) as stream:
            yield cast("BinaryIO", BufferedReader(stream, 1 << 20))
    else:
        with file.path.open("rb", buffering=1 << 20) as plain:
            yield plain


@contextmanager
def checking(file: TextFile, bad: BadRows) -> Iterator[None]:
    """Convert errors of reading ``file`` in the ``with`` block.

    Damaged content, such as a compressed file that ends early, ends the block and is counted in ``bad``.

    Raises:
        DataError: The file cannot be read, or it is damaged and ``bad`` does not skip damaged rows.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, DamagedFileError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # None: raised by a decompressor
            message = f"cannot be read ({error.strerror})"
            raise DataError(Problem(str(file.path), message, "Check the file and its permissions")) from error
        kind = (file.compression or file.format).removeprefix(".")
        message = f"is not a complete {kind} file ({error})"
        bad.skip("damaged file", Problem(str(file.path), message, "Restore the file, or correct its suffix"), error)


def no_such_key(where: str, key: str, keys: Iterable[str], todo: str) -> Problem:
    """Return the problem of a record or table that has ``keys``, but not ``key``."""
    known = [repr(name) for name in keys]
    if not known:
        return Problem(where, f"has no key '{key}', nor any other", "Remove the empty record")
    listed = ", ".join(known[:LISTED_KEYS]) + (", …" if len(known) > LISTED_KEYS else "")
    return Problem(where, f"has no key '{key}', only {listed}", todo)
