"""Index of a folder of token files: the file, byte range and token count of each sample.

All files are listed and their lists of samples are read once, by several threads, and joined into one table. The table
is cached in a file, which the processes of a machine map into their memory.

Shapes: N samples in all files together, without those that are too short; F files; n samples of one file; B blocks.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internlm.data.fingerprint import LEVELS, FileDigest, Level, digest_file
from internlm.data.index_cache import CachedIndex, IndexCache
from internlm.data.token_files import DataFile, Remote, SampleError, Span, TokenFormat, find_files
from internlm.utils.errors import DataError, Problem

VERSION = 4
CACHE_NAME = ".internlm_index"
#: Threads that read lists of samples: most of the time of small files is that of system calls, more so over a network.
THREADS = 4


class _FileIndex(NamedTuple):
    """Samples of one file."""

    samples: np.ndarray  # [3, n] int64: byte offset, tokens, size in bytes; without those that are too short
    kept: np.ndarray | None  # [n] int64, row of each sample in the file; None: no sample is too short
    dropped: int
    digest: FileDigest
    checksums: np.ndarray  # [B] uint32


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index of all samples, grouped by file."""

    files: list[DataFile]
    offsets: np.ndarray  # [N] int64, byte offset in the file
    lengths: np.ndarray  # [N] int64, tokens
    sizes: np.ndarray  # [N] int64, bytes
    rows: np.ndarray  # [N] int64, row in the file; [0] if no sample is too short
    starts: list[int]  # F + 1: samples before each file, and all
    checksums: np.ndarray  # uint32, CRC-32 of each block of all files; [0] below the level "full"
    blocks: list[int]  # F + 1: blocks before each file, and all
    digests: list[FileDigest]
    dropped: int  # number of samples that are too short
    cache: IndexCache
    key: str  # of the files and the shortest length: what else is made from the lengths may be kept under it

    def file_of(self, sample: int) -> int:
        """Return the index of the file of a sample."""
        return bisect_right(self.starts, sample) - 1

    def span(self, sample: int) -> Span:
        """Return the place of a sample in its file."""
        return Span(self.offsets.item(sample), self.sizes.item(sample), self.lengths.item(sample))

    def row(self, sample: int) -> int:
        """Return the row of a sample in its file, in which samples that are too short count too."""
        return int(self.rows[sample]) if len(self.rows) else sample - self.starts[self.file_of(sample)]

    def checksums_of(self, file_id: int) -> np.ndarray | None:
        """Return the checksums of the blocks of a file, uint32; None if there are none."""
        some = self.checksums[self.blocks[file_id] : self.blocks[file_id + 1]]
        return some if len(some) else None


def open_index(
    folder: Path,
    formats: Sequence[TokenFormat],
    min_length: int,
    cache_folder: Path | None,
    level: Level,
    remote: Remote | None = None,
) -> Index:
    """Open the index of ``folder``; use the cached one if it is up to date.

    Args:
        folder: Root folder of the token files.
        formats: Formats of files to look for.
        min_length: Minimum number of tokens in a sample; shorter samples are dropped.
        cache_folder: Folder of the cached index; None: ``folder`` itself.
        level: Level of the fingerprint.
        remote: Remote folder that ``folder`` has copies of; None: a local folder.

    Raises:
        DataError: ``folder`` is missing, a file in it is damaged, or no sample of two or more tokens is left.
    """
    files = find_files(folder, formats, remote)
    # A file without its suffix has a cache of its own beside it.
    path = folder / CACHE_NAME if folder.is_dir() else folder.with_name(f"{CACHE_NAME}-{folder.name}")
    if cache_folder is not None:
        path = cache_folder / f"{_digest(str(folder.resolve()))}.index"
    cache = IndexCache(path, folder if folder.is_dir() else folder.parent)
    # Sizes and times identify the content, as in make: hashing terabytes at every start is not affordable. The change
    # time among them cannot be set, so an edit that restores the modification time is noticed.
    key = _digest(VERSION, min_length, [(f.name, f.format.name, f.stamp, f.side_stamp) for f in files])
    loaded = cache.load_or_build(
        key,
        build=lambda: _build(files, min_length, level),
        fits=lambda found: LEVELS.index(found.header["level"]) >= LEVELS.index(level),
    )
    index = _assemble(files, loaded, cache, key)
    if not (index.lengths > 1).any():  # a sample of one token has no label
        raise DataError(_nothing_left(folder, files, min_length))
    return index


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _assemble(files: list[DataFile], loaded: CachedIndex, cache: IndexCache, key: str) -> Index:
    header, columns = loaded
    return Index(
        files=files,
        starts=[0, *np.cumsum(header["samples"], dtype=np.int64).tolist()],
        blocks=[0, *np.cumsum(header["blocks"], dtype=np.int64).tolist()],
        digests=[FileDigest(*digest) for digest in header["digests"]],
        dropped=header["dropped"],
        cache=cache,
        key=key,
        **columns,
    )


def _build(files: list[DataFile], min_length: int, level: Level) -> CachedIndex:
    """Read the samples of all files."""
    # Threads rather than processes: on a network file system the time is that of waiting.
    with ThreadPoolExecutor(min(THREADS, 2 * (os.cpu_count() or 1), len(files))) as pool:
        indexed = list(pool.map(partial(_index_file, min_length=min_length, level=level), files, chunksize=16))
    offsets, lengths, sizes = np.concatenate([file.samples for file in indexed], axis=1)
    dropped = sum(file.dropped for file in indexed)
    rows = [np.arange(file.samples.shape[1]) if file.kept is None else file.kept for file in indexed if dropped]
    columns = {
        "offsets": offsets,
        "lengths": lengths,
        "sizes": sizes,
        "rows": np.concatenate(rows) if rows else np.empty(0, np.int64),
        "checksums": np.concatenate([file.checksums for file in indexed]),
    }
    header = {
        "level": level,
        "dropped": dropped,
        "samples": [file.samples.shape[1] for file in indexed],
        "blocks": [len(file.checksums) for file in indexed],
        "digests": [file.digest for file in indexed],
    }
    return CachedIndex(header, columns)


def _index_file(file: DataFile, min_length: int, level: Level) -> _FileIndex:
    samples = _samples_of(file)
    # Of all samples, so that the digest of a file does not depend on min_length.
    digest, checksums = digest_file(file, samples, level)
    long_enough = samples[1] >= min_length
    kept = None if long_enough.all() else np.flatnonzero(long_enough)
    dropped = 0 if kept is None else samples.shape[1] - len(kept)
    return _FileIndex(samples if kept is None else samples[:, kept], kept, dropped, digest, checksums)


def _samples_of(file: DataFile) -> np.ndarray:
    try:
        return file.format.samples(file)
    except SampleError as error:  # of a file that cannot be copied
        raise DataError(Problem(file.where, error.message, error.todo)) from error
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
        raise DataError(Problem(str(file.path), message, "Check the file and its permissions")) from error


def _nothing_left(folder: Path, files: list[DataFile], min_length: int) -> Problem:
    longest = max((int(_samples_of(file)[1].max(initial=0)) for file in files), default=0)
    if 1 < longest < min_length:
        message = f"all samples have fewer tokens than data.min_length = {min_length} (the longest: {longest})"
        return Problem(str(folder), message, f"Set data.min_length to at most {longest}")
    found = "no sample of two or more tokens"
    if longest == 1:
        found = "only samples of one token, which have no next token to predict"
    todo = "Check the source texts, then create the files again with `internlm tokenize`"
    return Problem(str(folder), f"its {len(files)} token files contain {found}", todo)
