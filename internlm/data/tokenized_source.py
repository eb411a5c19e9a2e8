"""Sample source that reads a folder of token files and checks each sample as it is read.

Shapes: N samples in the source.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from internlm.data.binary_tokens import BinaryTokens
from internlm.data.fingerprint import Level, file_list, fingerprint
from internlm.data.index import open_index
from internlm.data.json_lines import JsonLines
from internlm.data.provenance import Origin
from internlm.data.sources import INPUT_ONLY_ZERO
from internlm.data.token_files import OpenFile, Remote, SampleError, TokenFormat, TokenReader

OPEN_FILES = 256  # far below the usual limit of 1024 descriptors, which sockets of the process groups share
#: Formats of ``data.type = "tokenized"``, which a folder may mix.
TOKENIZED: tuple[TokenFormat, ...] = (JsonLines(), BinaryTokens())


class TokenizedSource:
    """Sample source over a tree of token files; first-level sub-folders name the dataset types.

    If a file changes while it is in use, :meth:`read` raises an error that names the file and the sample, instead of
    returning changed tokens.

    Args:
        folder: Root folder of the tree.
        min_length: Minimum number of tokens in a sample; shorter samples are dropped.
        vocab_size: Exclusive upper bound of the token ids.
        cache_folder: Folder of the cached index; None: ``folder`` itself.
        level: Level of the fingerprint. With ``full``, every read is compared with checksums too.
        formats: Formats of the files.
        remote: Remote folder that ``folder`` has copies of; None: a local folder.

    Raises:
        DataError: ``folder`` is missing, or a file in it is damaged.
    """

    def __init__(
        self,
        folder: str,
        min_length: int,
        vocab_size: int,
        cache_folder: str | None = None,
        *,
        level: Level = "sampled",
        formats: Sequence[TokenFormat] = TOKENIZED,
        remote: Remote | None = None,
    ) -> None:
        self._vocab_size, self._level = vocab_size, level
        cache = Path(cache_folder) if cache_folder else None
        self.index = open_index(
            # Copies are verified whenever they are read: their checksums cost little when each file is copied anyway.
            Path(folder),
            formats,
            min_length,
            cache,
            level if remote is None else "full",
            remote,
        )
        self.dropped = self.index.dropped
        # A file that leaves this cache is closed once no thread is reading it any more.
        self._reader = functools.lru_cache(OPEN_FILES)(self._open)
        self.lengths = self.index.lengths  # [N]
        counts = np.diff(self.index.starts)  # samples of each file
        names = [file.type_name for file in self.index.files]
        self.types = sorted({name for name, count in zip(names, counts, strict=True) if count})
        #: Dataset types that ``min_length`` leaves without a sample.
        self.emptied_types = sorted({file.type_name for file in self.index.files if file.size} - set(self.types))
        numbers = {name: number for number, name in enumerate(self.types)}
        # One per sample, so as small as the number of types allows.
        dtype = np.int16 if len(numbers) <= np.iinfo(np.int16).max else np.int32
        type_of_file = np.array([numbers.get(name, 0) for name in names], dtype)
        self.type_ids = np.repeat(type_of_file, counts)  # [N]
        # Read one sample of each type now, so that a wrong tokenizer is found before the model is built.
        found: set[str] = set()
        for name, start, count in zip(names, self.index.starts, counts, strict=False):
            if count and name not in found:
                found.add(name)
                self.read(start)

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, integers [stop - begin]; by default all.

        Raises:
            DataError: The file has changed since it was indexed, the sample is damaged, or a token id is outside the
                vocabulary.
        """
        index = self.index
        span = index.span(sample)
        stop = span.length if stop is None else min(stop, span.length)
        try:
            tokens = self._reader(index.file_of(sample)).read(span, begin, stop)
            self._check_ids(tokens)
        except SampleError as error:
            raise error.at(index.files[index.file_of(sample)], index.row(sample), span.offset) from error
        return tokens

    def _check_ids(self, tokens: np.ndarray) -> None:
        size = self._vocab_size
        # As unsigned numbers, negative ids are large: one pass suffices where there are none.
        unsigned = tokens if tokens.dtype.kind == "u" else tokens.view(np.uint64)
        if not len(tokens) or np.maximum.reduce(unsigned) < size:
            return
        tokens = tokens.astype(np.int64)
        if -size < tokens.min() <= tokens.max() < size:
            return
        tokens = tokens[tokens != INPUT_ONLY_ZERO]
        largest = max(-int(tokens.min(initial=0)), int(tokens.max(initial=0)))  # not abs: that of -2^63 is negative
        if largest >= size:
            message = f"contains token {largest}, but model.vocab_size is {size}"
            raise SampleError(message, "Tokenize the texts with the tokenizer of the model")

    def fingerprint(self) -> str:
        """Return the fingerprint of names, lengths and tokens; a copy of the folder has the same one."""
        return fingerprint(self.index.files, self.index.digests, self.dropped, self._level)

    def files(self) -> str:
        """Return the list of the files with their digests, for checkpoints."""
        return file_list(self.index.files, self.index.digests, self._level)

    def origin(self, sample: int) -> Origin:
        """Return the file, row and bytes of a sample."""
        index, span = self.index, self.index.span(sample)
        path = str(index.files[index.file_of(sample)].path)
        return Origin(path, index.row(sample), span.offset, span.size)

    def _open(self, file_id: int) -> TokenReader:
        file = self.index.files[file_id]
        return file.format.reader(OpenFile(file, self.index.checksums_of(file_id)))
