r"""Token files of Megatron-LM: ``X.bin``, the ids one after the other, and ``X.idx``, which lists the samples.

An ``.idx`` is little-endian and has, without gaps: the magic ``MMIDIDX\\0\\0``, version (8 bytes, 1), code of the ids'
dtype (1 byte), sequences n (8 bytes), entries of the document index D (8 bytes), tokens of each sequence (int32 [n]),
byte offset of each sequence (int64 [n]), first sequence of each document (int64 [D]). A multimodal file has a byte per
sequence after that; such files are refused. Each sequence is a sample.

Shapes: n samples in a file.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from internlm.data.token_files import DataFile, OpenFile, SampleError, Span
from internlm.utils.errors import DataError, Problem

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
#: Dtypes of ids by their code. Code 6 and 7, of floats, are refused.
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
REMAKE = "Recreate the .bin and .idx files with Megatron-LM's preprocess_data.py"


class MegatronTokens:
    """Format of Megatron-LM's indexed data sets."""

    name = "megatron"
    suffix = ".bin"
    remake = REMAKE

    def side(self, path: Path) -> Path:
        """Return the path of the ``.idx`` of a ``.bin``."""
        return path.with_suffix(".idx")

    def samples(self, file: DataFile) -> np.ndarray:
        """Read and check the ``.idx``; return byte offset, token count and size in bytes, int64 [3, n].

        Raises:
            DataError: It is damaged, or does not match the ``.bin``.
        """
        with file.open_side() as stream:
            dtype, count = _read_header(file.side, stream.read(HEADER.size), file.side_stamp and file.side_stamp.size)
            lengths = np.frombuffer(stream.read(4 * count), "<i4").astype(np.int64)
            offsets = np.frombuffer(stream.read(8 * count), "<i8").astype(np.int64)
        if len(lengths) != count or len(offsets) != count:
            raise DataError(Problem(str(file.side), "has changed while it was read", REMAKE))
        sizes = lengths * dtype.itemsize
        # Compared by subtraction: a sum with a hostile offset would overflow.
        wrong = (lengths < 0) | (offsets < 0) | (offsets > file.size) | (sizes > file.size - offsets)
        if wrong.any():
            row = int(wrong.argmax())
            message = f"sequence {row} has {lengths[row]} tokens at byte {offsets[row]}"
            where = f"does not match {file.path.name} ({file.size} bytes)"
            raise DataError(Problem(str(file.side), f"{where}: {message}", REMAKE))
        return np.stack([offsets, lengths, sizes])

    def reader(self, opened: OpenFile) -> _Reader:
        """Return the decoder of an open ``.bin``."""
        return _Reader(opened)


def _read_header(path: Path, content: bytes, size: int | None) -> tuple[np.dtype, int]:
    """Return the dtype of the ids and the number of samples; compare the sizes with that of the file."""
    if len(content) < HEADER.size or content[:9] != MAGIC:
        raise DataError(Problem(str(path), f"does not begin as an .idx of Megatron-LM ({content[:9]!r})", REMAKE))
    _, version, code, count, documents = HEADER.unpack(content)
    if version != 1:
        raise DataError(Problem(str(path), f"expected version 1, got {version}", REMAKE))
    if code not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise DataError(Problem(str(path), f"the code {code} is no dtype of integer ids (known: {known})", REMAKE))
    # Compared before anything is allocated: Python's integers do not overflow.
    expected = HEADER.size + 12 * count + 8 * documents
    if size is not None and size != expected:
        message = f"{count} sequences and {documents} documents need {expected} bytes, the file has {size}"
        todo = f"{REMAKE}, without modes of multimodal data"
        raise DataError(Problem(str(path), message, todo))
    return np.dtype(DTYPES[code]), count


class _Reader:
    """Decoder of an open ``.bin``."""

    def __init__(self, opened: OpenFile) -> None:
        self._opened = opened
        path = opened.file.side
        # Only the .idx has the dtype. Its other content is in the index, so it is not compared with the file again.
        try:
            with opened.file.open_side() as stream:
                self._dtype, _ = _read_header(path, stream.read(HEADER.size), None)
        except (OSError, DataError) as error:
            raise SampleError(f"{path.name} has changed or cannot be read ({error})", REMAKE) from error

    def read(self, span: Span, begin: int, stop: int) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, int64 [stop - begin]."""
        size = self._dtype.itemsize
        content = self._opened.read(span.offset + begin * size, max(stop - begin, 0) * size)
        return np.frombuffer(content, self._dtype).astype(np.int64)
