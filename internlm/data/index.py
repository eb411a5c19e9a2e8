"""The index of a folder of tokenized files: where each sample lies.

A folder holds, at any depth, pairs ``X.bin`` (one JSON line per sample) and ``X.bin.meta`` (a NumPy array [samples,
2] of byte offset and token count). The index joins all of them into one table, which is kept in a file so that the
next start need not open them all, and which processes of one machine share, because it is memory-mapped.

N: samples of all files.
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

VERSION = 1
CACHE_NAME = ".internlm_index.npy"
REMAKE = "Make both files again with `internlm tokenize`."
# A token takes at least a digit and a comma, and at most a sign, 19 digits and a comma with blanks.
LEAST_BYTES, MOST_BYTES, MOST_EXTRA = 2, 32, 4096


class DataFile(NamedTuple):
    """One ``.bin`` file, as it was when the index was opened."""

    path: Path
    name: str  # relative to the folder
    size: int  # bytes
    mtime_ns: int

    @property
    def meta(self) -> Path:
        """Its ``.meta`` file."""
        return self.path.with_name(self.path.name + ".meta")

    @property
    def type_name(self) -> str:
        """First-level sub-folder, which names the data-set type."""
        return self.name.split("/")[0] if "/" in self.name else "default"


class Index(NamedTuple):
    """Where each sample lies. Samples of one file are neighbours, in the order of the file."""

    files: list[DataFile]
    offsets: np.ndarray  # [N] int64, byte in the file
    lengths: np.ndarray  # [N] int64, tokens
    file_ids: np.ndarray  # [N] int64, index into files


def open_index(folder: Path, min_length: int, cache_folder: Path | None) -> Index:
    """The index of ``folder``, from its cache where that fits, else made anew and kept.

    The cache lies in ``cache_folder``, or in ``folder`` itself where None. Files of fewer than ``min_length`` samples
    are left out. Raises :class:`DataError` where the folder or a file in it can't serve.
    """
    files = find_files(folder)
    cache = folder / CACHE_NAME
    if cache_folder is not None:
        cache = cache_folder / f"{_digest(str(folder.resolve())):x}.npy"
    key = _digest(VERSION, min_length, [(f.name, f.size, f.mtime_ns, *_stamp(f.meta)) for f in files])
    table = _load(cache, key)
    if table is None:
        table = _store(cache, key, _build(files, min_length))
    if not (table[1, 1:] > 1).any():  # a single token has none to predict
        raise DataError(_nothing_left(folder, files, min_length))
    return Index(files, *np.asarray(table)[:, 1:])


def find_files(folder: Path) -> list[DataFile]:
    """All ``.bin`` files under ``folder``, sorted by relative name. Raises :class:`DataError` where there are none."""
    if not folder.is_dir():
        raise DataError(Problem(str(folder), "there is no such folder", "Correct the path."))
    paths = sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise DataError(Problem(str(folder), "holds no .bin file", "Make some with `internlm tokenize`."))
    files = [DataFile(path, path.relative_to(folder).as_posix(), *_stamp(path)) for path in paths]
    if lonely := [file for file in files if not file.meta.is_file()]:
        raise DataError(*(Problem(str(file.meta), f"is missing beside {file.path.name}", REMAKE) for file in lonely))
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """``.bin`` files, through symbolic links too, but not through one that leads back to a folder above it."""
    for here, folders, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [name for name in folders if not real.is_relative_to((real / name).resolve())]
        yield from (Path(here, name) for name in names if name.endswith(".bin"))


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _build(files: list[DataFile], min_length: int) -> np.ndarray:
    """The table, [3, 1 + N] int64; column 0 is left for the seal."""
    parts = [np.zeros((3, 1), np.int64)]
    for file_id, file in enumerate(files):
        meta = read_meta(file)
        if len(meta) >= min_length:
            parts.append(np.vstack([meta.T, np.full(len(meta), file_id)]))
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def read_meta(file: DataFile) -> np.ndarray:
    """The ``.meta`` of a file, [samples, 2] int64. Raises :class:`DataError` where it and the ``.bin`` disagree."""
    meta = _open_meta(file.meta)
    offsets, lengths = meta[:, 0], meta[:, 1]
    sizes = np.diff(offsets, append=file.size)
    wrong = (offsets < 0) | (sizes < 1) | (sizes < LEAST_BYTES * lengths) | (sizes > MOST_BYTES * lengths + MOST_EXTRA)
    wrong |= (lengths < 0) | (lengths > file.size)
    if wrong.any():
        row = int(wrong.argmax())
        what = f"sample {row} at byte {offsets[row]} is to hold {lengths[row]} tokens in {sizes[row]} bytes"
        raise _disagree(file, what)
    if not _last_line_is_whole(file, offsets):
        raise _disagree(file, f"the last of its {len(meta)} samples isn't the whole line that ends the file")
    return meta


def _disagree(file: DataFile, what: str) -> DataError:
    return DataError(Problem(str(file.meta), f"disagrees with {file.path.name} of {file.size} bytes: {what}", REMAKE))


def _last_line_is_whole(file: DataFile, offsets: np.ndarray) -> bool:
    if not len(offsets):
        return file.size == 0
    with file.path.open("rb") as stream:
        stream.seek(int(offsets[-1]))
        line = stream.read().rstrip()
    return b"\n" not in line and line.endswith(b"}")


def _open_meta(path: Path) -> np.ndarray:
    # Mapping reads no pickle, and allocates nothing on the word of a header.
    try:
        meta = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, OSError) as error:
        what = f"isn't a plain NumPy array of byte offsets and token counts ({error})"
        raise DataError(Problem(str(path), what, f"Pickled arrays are refused. {REMAKE}")) from error
    if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
        what = f"holds {meta.dtype} of shape {list(meta.shape)}, not integers of shape [samples, 2]"
        raise DataError(Problem(str(path), what, REMAKE))
    return np.array(meta, np.int64)


def _nothing_left(folder: Path, files: list[DataFile], min_length: int) -> Problem:
    largest = max(len(read_meta(file)) for file in files)
    if largest < min_length:
        what = f"all {len(files)} files have fewer samples than data.min_length = {min_length} (the largest: {largest})"
        return Problem(str(folder), what, "Lower data.min_length.")
    return Problem(str(folder), "its files hold no tokens", REMAKE)


# -- the kept table: column 0 seals it, with the digest of what it was made from and the checksum of the rest


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=7).digest(), "big")


def _checksum(table: np.ndarray) -> int:
    checksum = 0
    for row in table:
        checksum = zlib.crc32(row[1:], checksum)
    return checksum


def _load(path: Path, key: int) -> np.ndarray | None:
    """The kept table; None where there is none, or where it is damaged or of other data."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, OSError):
        return None
    fits = table.dtype == np.int64 and table.ndim == 2 and table.shape[0] == 3 and table.shape[1] >= 1
    return table if fits and table[0, 0] == key and table[1, 0] == _checksum(table) else None


def _store(path: Path, key: int, table: np.ndarray) -> np.ndarray:
    """Keep ``table`` and return it mapped, or as it is where the place isn't writable; others may do so meanwhile."""
    table[:2, 0] = key, _checksum(table)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as stream:
            np.save(stream, table)
        os.replace(partial, path)
    except OSError as error:
        get_logger().debug("the index of the data isn't kept: %s", error)
        with suppress(OSError):
            partial.unlink()
        return table
    loaded = _load(path, key)
    return table if loaded is None else loaded
