"""Sample source that reads a folder of tokenized files and checks each sample as it is read.

Shapes: N samples in the source.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from internlm.data.index import REMAKE, DataFile, open_index, open_meta
from internlm.data.sources import input_ids
from internlm.utils.errors import DataError, Problem

OPEN_FILES = 256  # far below the usual limit of 1024 descriptors, which sockets of the process groups share


class TokenizedSource:
    """Sample source over a tree of ``.bin`` and ``.bin.meta`` files; first-level sub-folders name the dataset types.

    If a file changes while it is in use, :meth:`read` raises an error that names the file and the sample, instead of
    returning changed tokens.

    Args:
        folder: Root folder of the tree.
        min_length: Minimum number of tokens in a sample; shorter samples are dropped.
        vocab_size: Exclusive upper bound of the token ids.
        cache_folder: Folder of the cached index; None: ``folder`` itself.

    Raises:
        DataError: ``folder`` is missing, or a file in it is damaged.
    """

    def __init__(self, folder: str, min_length: int, vocab_size: int, cache_folder: str | None = None) -> None:
        self._vocab_size = vocab_size
        self._index = open_index(Path(folder), min_length, Path(cache_folder) if cache_folder else None)
        self.dropped = self._index.dropped
        # Plain reads rather than a memory map: truncating a file kills a process that has mapped it (SIGBUS), while a
        # read returns too few bytes. A file that leaves this cache is closed once no thread is reading it any more.
        self._open = functools.lru_cache(OPEN_FILES)(_open)
        self.lengths = self._index.lengths  # [N]
        used = np.unique(self._index.file_ids)
        self.types = sorted({self._index.files[i].type_name for i in used})
        #: Dataset types that ``min_length`` leaves without a sample.
        self.emptied_types = sorted({file.type_name for file in self._index.files if file.size} - set(self.types))
        type_of_file = np.zeros(len(self._index.files), np.int16)
        for i in used:
            type_of_file[i] = self.types.index(self._index.files[i].type_name)
        self.type_ids = type_of_file[self._index.file_ids]  # [N]
        # Read one sample of each type now, so that a wrong tokenizer is found before the model is built.
        for first in np.unique(self.type_ids, return_index=True)[1]:
            self.read(int(first))

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, int64 [stop - begin]; by default all.

        Raises:
            DataError: The file has changed since it was indexed, the sample is damaged, or a token id is outside the
                vocabulary.
        """
        tokens = self._parse(sample, self._line(sample))
        if len(tokens) != self.lengths[sample]:
            message = f"expected {self.lengths[sample]} tokens as in {self._file(sample).meta.name}, got {len(tokens)}"
            raise self._error(sample, message, REMAKE)
        if len(tokens) and (largest := int(input_ids(tokens).max())) >= self._vocab_size:
            message = f"contains token {largest}, but model.vocab_size is {self._vocab_size}"
            raise self._error(sample, message, "Tokenize the texts with the tokenizer of the model")
        return tokens[begin:stop]

    def fingerprint(self) -> str:
        """Return a digest of the file names, the file sizes and the index; a copy of the folder has the same digest."""
        digest = hashlib.blake2b(digest_size=16)
        # Names and sizes, not paths and modification times: a copy of the data has the same fingerprint.
        digest.update(json.dumps([file[1:3] for file in self._index.files]).encode())
        for column in (self._index.offsets, self._index.lengths, self._index.file_ids):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def _file(self, sample: int) -> DataFile:
        return self._index.files[self._index.file_ids[sample]]

    def _line(self, sample: int) -> bytes:
        """Read the bytes of a sample, and check that the file has not changed since it was indexed."""
        file, offset, size = self._file(sample), int(self._index.offsets[sample]), int(self._index.sizes[sample])
        try:
            stream = self._open(file.path)
            stat = os.fstat(stream.fileno())  # of the open file: detects a replaced file of the same name
            line = os.pread(stream.fileno(), size, offset)  # threads share the descriptor: no seek
        except OSError as error:
            raise self._error(sample, f"cannot be read ({error.strerror})", "Restore the file and resume") from error
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns) or len(line) != size:
            message = f"the file has changed since it was opened ({file.size} bytes then, {stat.st_size} bytes now)"
            raise self._error(sample, message, "Restore the original file, or start a new run")
        return line

    def _parse(self, sample: int, line: bytes) -> np.ndarray:
        try:
            tokens = np.asarray(json.loads(line)["tokens"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            message = f'is not a JSON line {{"tokens": [...]}} ({type(error).__name__}: {error})'
            raise self._error(sample, message, REMAKE) from error
        # NumPy would silently turn [1, 2.5] into floats and [1, "2"] into strings.
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind != "i"):
            message = f"expected a list of integers as tokens, got {tokens.dtype} of shape {list(tokens.shape)}"
            raise self._error(sample, message, REMAKE)
        return tokens.astype(np.int64, copy=False)

    def _error(self, sample: int, message: str, todo: str) -> DataError:
        row = self._row(sample)
        where = f"{self._file(sample).path}:{row + 1} (sample {row}, byte {self._index.offsets[sample]})"
        return DataError(Problem(where, message, todo))

    def _row(self, sample: int) -> int:
        """Return the row of a sample in its file, in which samples that are too short count too."""
        file_ids = self._index.file_ids
        if self.dropped:
            with suppress(DataError):  # a .meta that was removed since
                return int(np.searchsorted(open_meta(self._file(sample).meta)[:, 0], self._index.offsets[sample]))
        return sample - int(np.searchsorted(file_ids, file_ids[sample]))


def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)
