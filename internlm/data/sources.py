"""Reproducible numbers for the data: by purpose and index, the same with every version of NumPy.

Tokenized files as a source of samples.

N: samples of the source.

Sources of samples: the interface, random data, and a part of another source.

N: samples of the source.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from internlm.data.index import REMAKE, DataFile, open_index
from internlm.utils.errors import DataError, Problem


class Purpose(IntEnum):
    """What numbers are drawn for. Each purpose has streams of its own."""

    ORDER = 0  # of the samples in an epoch
    LENGTHS = 1  # of random samples
    TOKENS = 2  # of a random sample


def raw_numbers(count: int, seed: int, purpose: Purpose, index: int = 0) -> np.ndarray:
    """``count`` uniform uint64 numbers."""
    # NumPy keeps its raw bit streams stable, but not what its distributions make of them (NEP 19).
    stream = np.random.SeedSequence(seed, spawn_key=(purpose, index))
    return np.random.PCG64(stream).random_raw(count)


OPEN_FILES = 256


class TokenizedSource:
    """A folder tree of ``.bin`` and ``.bin.meta`` files; the first-level sub-folder names the type.

    Files of fewer than ``min_length`` samples are left out. The index is kept in ``cache_folder``, or in the folder
    where None. Every sample is checked as it is read, so that a file which changes meanwhile is an error, and never
    another sample. Raises :class:`DataError` where the folder or a file can't serve.
    """

    def __init__(self, folder: str, min_length: int, vocab_size: int, cache_folder: str | None = None) -> None:
        self._vocab_size = vocab_size
        self._index = open_index(Path(folder), min_length, Path(cache_folder) if cache_folder else None)
        # Plain reads rather than a memory map: a file cut short would kill a process that has mapped it (SIGBUS).
        # Dropping a file from this cache closes it once no thread is reading it any more.
        self._open = functools.lru_cache(OPEN_FILES)(_open)
        self.lengths = self._index.lengths  # [N]
        used = np.unique(self._index.file_ids)
        self.types = sorted({self._index.files[i].type_name for i in used})
        type_of_file = np.zeros(len(self._index.files), np.int16)
        for i in used:
            type_of_file[i] = self.types.index(self._index.files[i].type_name)
        self.type_ids = type_of_file[self._index.file_ids]  # [N]
        for first in np.unique(self.type_ids, return_index=True)[1]:  # a wrong tokenizer shows at once
            self.read(int(first))

    def read(self, sample: int) -> np.ndarray:
        """Token ids of a sample, [length] int64. Raises :class:`DataError` where the file isn't as indexed."""
        tokens = self._parse(sample, self._line(sample))
        if len(tokens) != self.lengths[sample]:
            what = f"holds {len(tokens)} tokens, {self._file(sample).meta.name} says {self.lengths[sample]}"
            raise self._error(sample, what, REMAKE)
        if len(tokens) and (largest := int(np.abs(tokens).max())) >= self._vocab_size:
            what = f"holds token {largest}, but model.vocab_size is {self._vocab_size}"
            raise self._error(sample, what, "Wrong tokenizer? Tokenize with that of the model.")
        return tokens

    def fingerprint(self) -> str:
        """A digest of names, sizes and sample tables; moving or copying the folder doesn't change it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([file[1:3] for file in self._index.files]).encode())
        for part in self._index[1:]:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def _file(self, sample: int) -> DataFile:
        return self._index.files[self._index.file_ids[sample]]

    def _line(self, sample: int) -> bytes:
        """The sample's bytes, provided that the file is still the one that was indexed."""
        _, offsets, _, file_ids = self._index
        file, offset = self._file(sample), int(offsets[sample])
        last = sample + 1 == len(offsets) or file_ids[sample + 1] != file_ids[sample]
        size = (file.size if last else int(offsets[sample + 1])) - offset
        try:
            stream = self._open(file.path)
            stat = os.fstat(stream.fileno())
            line = os.pread(stream.fileno(), size, offset)
        except OSError as error:
            raise self._error(sample, f"can't be read ({error.strerror})", "Bring the file back and resume.") from error
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns) or len(line) != size:
            what = f"the file has changed since it was opened ({file.size} bytes then, {stat.st_size} now)"
            raise self._error(sample, what, "Bring the data back as it was, or start over.")
        return line

    def _parse(self, sample: int, line: bytes) -> np.ndarray:
        try:
            tokens = np.asarray(json.loads(line)["tokens"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f'isn\'t a JSON line {{"tokens": [...]}} ({type(error).__name__}: {error})'
            raise self._error(sample, what, REMAKE) from error
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind != "i"):
            raise self._error(sample, "its tokens aren't a list of integers", REMAKE)
        return tokens.astype(np.int64, copy=False)

    def _error(self, sample: int, what: str, todo: str) -> DataError:
        file_ids = self._index.file_ids
        row = sample - int(np.searchsorted(file_ids, file_ids[sample]))
        where = f"{self._file(sample).path}:{row + 1} (sample {row}, byte {self._index.offsets[sample]})"
        return DataError(Problem(where, what, todo))


def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


LONGEST_PATTERN = 8


class SampleSource(Protocol):
    """Samples by number; every method is a pure function of the data set."""

    types: list[str]  # names of the data-set types
    lengths: np.ndarray  # [N] int64, tokens per sample
    type_ids: np.ndarray  # [N] index into types

    def read(self, sample: int) -> np.ndarray:
        """Token ids of a sample, [length] int64. A negative id is an input (its absolute value) but never a label."""

    def fingerprint(self) -> str:
        """Changes where the samples, their order or their lengths change."""


class RandomSource:
    """Random samples, the same for the same seed.

    So that a model can learn, each repeats a short pattern, in which small ids are more frequent. With
    ``fixed_length`` every sample has exactly ``seq_len`` tokens instead, drawn uniformly and independently.
    """

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        seq_len: int,
        fixed_length: bool,
        type_name: str = "random",
        samples: int = 10_000,
    ) -> None:
        self._settings = (seed, vocab_size, seq_len, fixed_length)
        self._seed, self._vocab_size, self._fixed_length = seed, vocab_size, fixed_length
        shortest = seq_len if fixed_length else -(-seq_len // 8)
        spread = (raw_numbers(samples, seed, Purpose.LENGTHS) % (seq_len - shortest + 1)).astype(np.int64)
        self.lengths = shortest + spread  # [N]
        self.types = [type_name]
        self.type_ids = np.zeros(samples, np.int16)  # [N]

    def read(self, sample: int) -> np.ndarray:
        """Token ids of a sample, [length] int64."""
        length = int(self.lengths[sample])
        count = length if self._fixed_length else LONGEST_PATTERN + 1
        raw = raw_numbers(count, self._seed, Purpose.TOKENS, sample)
        if self._fixed_length:
            return (raw % self._vocab_size).astype(np.int64)
        size = 2 + int(raw[0]) % (LONGEST_PATTERN - 1)
        uniform = (raw[1 : 1 + size] >> 11) * 2.0**-53  # [size] in [0, 1)
        return np.resize((uniform * uniform * self._vocab_size).astype(np.int64), length)

    def fingerprint(self) -> str:
        """A digest of the settings."""
        return hashlib.blake2b(repr(self._settings).encode(), digest_size=16).hexdigest()


class OneType:
    """The samples of one type of another source, in its order."""

    def __init__(self, source: SampleSource, type_name: str) -> None:
        self._source = source
        self._samples = np.flatnonzero(source.type_ids == source.types.index(type_name))
        self.types = [type_name]
        self.lengths = source.lengths[self._samples]  # [N]
        self.type_ids = np.zeros(len(self._samples), np.int16)  # [N]

    def read(self, sample: int) -> np.ndarray:
        """Token ids of a sample, [length] int64."""
        return self._source.read(int(self._samples[sample]))

    def fingerprint(self) -> str:
        """That of the whole source."""
        return self._source.fingerprint()
