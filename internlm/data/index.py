"""Index of a folder of tokenized files: the file, byte range and token count of each sample.

A folder contains, at any depth, pairs ``X.bin`` (one JSON line per sample) and ``X.bin.meta`` (a NumPy array [samples,
2] of byte offset and token count). The index joins all ``.meta`` arrays into one table, cached in a file, so that the
next start need not read them again. The table is memory-mapped, so the processes of one machine share its memory.

Shapes: N samples in all files together, without those that are too short.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internlm.utils.errors import DataError, Problem
from internlm.utils.logger import get_logger

VERSION = 2
CACHE_NAME = ".internlm_index.npy"
DROPPED = (2, 0)  # entry of the cached table with the number of dropped samples
REMAKE = "Recreate the .bin and .bin.meta files with `internlm tokenize`"
# Bounds of a plausible .meta, checked without reading the .bin: the least and the most bytes of a token (a digit and a
# comma; a sign, 19 digits, a comma and blanks), and the most bytes of a line besides its tokens.
LEAST_BYTES, MOST_BYTES, MOST_EXTRA = 2, 32, 4096


class DataFile(NamedTuple):
    """A ``.bin`` file, with its size and modification time when the index was opened."""

    path: Path
    name: str  # relative to the folder
    size: int  # bytes
    mtime_ns: int

    @property
    def meta(self) -> Path:
        """Path of the ``.bin.meta`` file that belongs to this ``.bin`` file."""
        return self.path.with_name(self.path.name + ".meta")

    @property
    def type_name(self) -> str:
        """Dataset type: the first-level sub-folder, or ``default`` for a file directly in the folder."""
        return self.name.split("/")[0] if "/" in self.name else "default"


class Index(NamedTuple):
    """Index of all samples, grouped by file."""

    files: list[DataFile]
    offsets: np.ndarray  # [N] int64, byte offset in the file, ascending within a file
    lengths: np.ndarray  # [N] int64, tokens
    file_ids: np.ndarray  # [N] int64, index into files
    sizes: np.ndarray  # [N] int64, bytes of the line
    dropped: int  # number of samples that are too short


def open_index(folder: Path, min_length: int, cache_folder: Path | None) -> Index:
    """Open the index of ``folder``; use the cached table if it is up to date.

    Args:
        folder: Root folder of the ``.bin`` files.
        min_length: Minimum number of tokens in a sample; shorter samples are dropped.
        cache_folder: Folder of the cached table; None: ``folder`` itself.

    Raises:
        DataError: ``folder`` is missing, a file in it is damaged, or no sample of two or more tokens is left.
    """
    files = find_files(folder)
    cache = folder / CACHE_NAME
    if cache_folder is not None:
        cache = cache_folder / f"{_digest(str(folder.resolve())):x}.npy"
    # Names, sizes and times identify the content, as in make; hashing terabytes at every start is not affordable.
    key = _digest(VERSION, min_length, [(f.name, f.size, f.mtime_ns, *_stamp(f.meta)) for f in files])
    table = _load(cache, key)
    if table is None:
        table = _store(cache, key, _build(files, min_length))
    if not (table[1, 1:] > 1).any():  # a sample of one token has no label
        raise DataError(_nothing_left(folder, files, min_length))
    offsets, lengths, file_ids, sizes = np.asarray(table)[:, 1:]
    return Index(files, offsets, lengths, file_ids, sizes, int(table[DROPPED]))


def find_files(folder: Path) -> list[DataFile]:
    """Return all ``.bin`` files under ``folder``, sorted by their path relative to ``folder``.

    Raises:
        DataError: The folder is missing, contains no ``.bin`` file, a ``.bin`` file has no ``.meta``, or the name of a
            dataset type has control characters.
    """
    if not folder.is_dir():
        todo = "Set data.train_folder or data.valid_folder to an existing folder"
        raise DataError(Problem(str(folder), "no such folder", todo))
    paths = sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise DataError(Problem(str(folder), "contains no .bin file", "Create one with `internlm tokenize`"))
    files = [DataFile(path, path.relative_to(folder).as_posix(), *_stamp(path)) for path in paths]
    if garbled := [file for file in files if not file.type_name.isprintable()]:
        message = f"the folder {garbled[0].type_name!r}, which names a dataset type, has control characters in its name"
        raise DataError(Problem(str(folder), message, "Rename it"))
    if lonely := [file for file in files if not file.meta.is_file()]:
        raise DataError(*(Problem(str(file.meta), f"is missing beside {file.path.name}", REMAKE) for file in lonely))
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all ``.bin`` files under ``folder``; follow symbolic links except those to a parent folder."""
    for here, folders, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [name for name in folders if not real.is_relative_to((real / name).resolve())]
        yield from (Path(here, name) for name in names if name.endswith(".bin"))


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _build(files: list[DataFile], min_length: int) -> np.ndarray:
    """Build the table of the index, int64 [4, 1 + N], with rows of byte offsets, token counts, file ids and line sizes.

    Column 0 has room for the key and the checksum of the cached table, and has the number of dropped samples.
    """
    columns, dropped = [np.zeros((4, 1), np.int64)], 0
    for file_id, file in enumerate(files):
        offsets, lengths = read_meta(file).T
        samples = np.vstack([offsets, lengths, np.full_like(offsets, file_id), _line_sizes(file, offsets)])
        long_enough = lengths >= min_length
        columns.append(samples[:, long_enough])
        dropped += int(np.count_nonzero(~long_enough))
    columns[0][DROPPED[0]] = dropped
    return np.ascontiguousarray(np.concatenate(columns, axis=1))


def _line_sizes(file: DataFile, offsets: np.ndarray) -> np.ndarray:
    return np.diff(offsets, append=file.size)


def read_meta(file: DataFile) -> np.ndarray:
    """Read the ``.meta`` of a ``.bin`` file, and check that the two match.

    Returns:
        Byte offset and token count of each sample, int64 [samples, 2].

    Raises:
        DataError: The ``.meta`` is not an integer array of this shape, or does not match the ``.bin``.
    """
    meta = open_meta(file.meta)
    offsets, lengths = meta[:, 0], meta[:, 1]
    sizes = _line_sizes(file, offsets)
    wrong = (offsets < 0) | (sizes < 1) | (sizes < LEAST_BYTES * lengths) | (sizes > MOST_BYTES * lengths + MOST_EXTRA)
    wrong |= (lengths < 0) | (lengths > file.size)
    if wrong.any():
        row = int(wrong.argmax())
        message = f"sample {row} at byte {offsets[row]} cannot have {lengths[row]} tokens in {sizes[row]} bytes"
        raise _disagree(file, message)
    if not _last_line_is_whole(file, offsets):
        message = f"the last sample (sample {len(meta) - 1}) does not end where the file ends"
        raise _disagree(file, message if len(meta) else "it lists no samples, but the file is not empty")
    return meta


def _disagree(file: DataFile, message: str) -> DataError:
    return DataError(Problem(str(file.meta), f"does not match {file.path.name} ({file.size} bytes): {message}", REMAKE))


def _last_line_is_whole(file: DataFile, offsets: np.ndarray) -> bool:
    if not len(offsets):
        return file.size == 0
    with file.path.open("rb") as stream:
        stream.seek(int(offsets[-1]))
        line = stream.read().rstrip()
    return b"\n" not in line and line.endswith(b"}")


def open_meta(path: Path) -> np.ndarray:
    """Read a ``.meta`` without comparing it with its ``.bin``: int64 [samples, 2].

    Raises:
        DataError: It is missing, or not an integer array of this shape.
    """
    # np.load can unpickle object arrays, and allocates any size that a forged header declares. open_memmap does
    # neither.
    try:
        meta = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, OSError) as error:
        message = f"is not a plain NumPy array of byte offsets and token counts ({error})"
        raise DataError(Problem(str(path), message, f"Pickled arrays are refused. {REMAKE}")) from error
    if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
        message = f"expected integers of shape [samples, 2], got {meta.dtype} of shape {list(meta.shape)}"
        raise DataError(Problem(str(path), message, REMAKE))
    return np.array(meta, np.int64)


def _nothing_left(folder: Path, files: list[DataFile], min_length: int) -> Problem:
    longest = max((int(read_meta(file)[:, 1].max(initial=0)) for file in files), default=0)
    if 1 < longest < min_length:
        message = f"all samples have fewer tokens than data.min_length = {min_length} (the longest: {longest})"
        return Problem(str(folder), message, f"Set data.min_length to at most {longest}")
    message = f"its {len(files)} .bin files contain no sample of two or more tokens"
    todo = "Check the source texts, then recreate the .bin and .bin.meta files with `internlm tokenize`"
    return Problem(str(folder), message, todo)


# -- cached table. Column 0 is the seal: the digest of names, sizes and times, a checksum of the other columns, and the
# -- number of dropped samples.


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=7).digest(), "big")


def _checksum(table: np.ndarray) -> int:
    checksum = 0
    for row in table:
        checksum = zlib.crc32(row[1:], checksum)
    return checksum


def _load(path: Path, key: int) -> np.ndarray | None:
    """Memory-map the cached table; return None if it is missing, damaged or built from other files."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, OSError):
        return None
    fits = table.dtype == np.int64 and table.ndim == 2 and table.shape[0] == 4 and table.shape[1] >= 1
    return table if fits and table[0, 0] == key and table[1, 0] == _checksum(table) else None


def _store(path: Path, key: int, table: np.ndarray) -> np.ndarray:
    """Cache ``table`` and return it memory-mapped, or return ``table`` itself if the folder is not writable."""
    table[:2, 0] = key, _checksum(table)
    # All ranks may run this at once: each writes its own file, and the last rename wins.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as stream:
            np.save(stream, table)
        os.replace(partial, path)
    except OSError as error:
        get_logger().debug("the data index is not cached: %s", error)
        with suppress(OSError):
            partial.unlink()
        return table
    loaded = _load(path, key)
    return table if loaded is None else loaded
