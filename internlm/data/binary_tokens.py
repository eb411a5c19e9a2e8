"""Binary token files: ``X.tokens``, a third to a half of the bytes of JSON lines, and read without parsing.

A file has four parts, all little-endian, and nothing after them:

=========  ======================================================================================================
header     :data:`HEADER`: magic, bytes per id (2 or 4), whether there is a mask, samples n, tokens T, and the CRC-32
           of header and index
ids        T unsigned integers of 2 or 4 bytes: the samples one after the other
mask       only if a token is an input alone (a negative id in JSON lines): ⌈T / 8⌉ bytes, one bit per token, the lowest
           bit of a byte first
index      n unsigned integers of 4 bytes: the tokens of each sample
=========  ======================================================================================================

Shapes: n samples in a file, T tokens.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from internlm.data.sources import INPUT_ONLY_ZERO, input_ids
from internlm.data.token_files import DataFile, OpenFile, Span
from internlm.utils.errors import DataError, Problem

MAGIC = b"ITOKENS\x01"  # with the version of the format
HEADER = struct.Struct("<8sHHIQQI28x")  # 64 bytes, so that ids are aligned
REMAKE = "Recreate the file with `internlm data convert`"
LARGEST_SHORT = np.iinfo(np.uint16).max
LARGEST_ID = np.iinfo(np.int32).max  # the negative of the next one is INPUT_ONLY_ZERO
LONGEST = np.iinfo(np.uint32).max  # tokens of a sample


class Header(NamedTuple):
    """Sizes of a binary token file."""

    id_size: int  # bytes
    has_mask: bool
    samples: int
    tokens: int
    checksum: int

    @property
    def mask_at(self) -> int:
        """Byte offset of the mask."""
        return HEADER.size + self.tokens * self.id_size

    @property
    def index_at(self) -> int:
        """Byte offset of the index."""
        return self.mask_at + (-(-self.tokens // 8) if self.has_mask else 0)

    @property
    def file_size(self) -> int:
        """Size of the whole file in bytes."""
        return self.index_at + 4 * self.samples

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the ids."""
        return np.dtype(f"<u{self.id_size}")

    def pack(self) -> bytes:
        """Encode the header."""
        return HEADER.pack(MAGIC, self.id_size, self.has_mask, 0, self.samples, self.tokens, self.checksum)

    def checksum_with(self, index: bytes) -> int:
        """Return the CRC-32 of the header without its checksum, and of the index."""
        return zlib.crc32(index, zlib.crc32(self._replace(checksum=0).pack()))


class BinaryTokens:
    """Format of unsigned ids with a mask of the tokens that are inputs only."""

    name = "binary"
    suffix = ".tokens"
    remake = REMAKE

    def side(self, path: Path) -> None:
        """Return None: the samples are listed in the file itself."""

    def samples(self, file: DataFile) -> np.ndarray:
        """Read and check header and index; return byte offset, token count and size in bytes, int64 [3, n].

        Raises:
            DataError: The header or the index is damaged, or the file is truncated.
        """
        with file.open() as stream:
            header = _read_header(file, stream.read(HEADER.size))
            stream.seek(header.index_at)
            index = stream.read()  # as many bytes as the header says: the size of the file was compared
        # Ids have no checksum here, which only a read of all of them could verify. The fingerprint's level "full" has.
        if header.checksum_with(index) != header.checksum:
            raise _damaged(file, "header or index do not match their checksum")
        lengths = np.frombuffer(index, "<u4").astype(np.int64)
        if int(lengths.sum()) != header.tokens:
            raise _damaged(file, f"the samples have {lengths.sum()} tokens, the header says {header.tokens}")
        sizes = lengths * header.id_size
        return np.stack([HEADER.size + np.cumsum(sizes) - sizes, lengths, sizes])

    def reader(self, opened: OpenFile) -> _Reader:
        """Return the decoder of an open file."""
        return _Reader(opened)


def _damaged(file: DataFile, message: str) -> DataError:
    return DataError(Problem(str(file.path), f"is damaged: {message}", REMAKE))


def _read_header(file: DataFile, content: bytes) -> Header:
    if len(content) < HEADER.size or content[:8] != MAGIC:
        message = f"does not begin as a binary token file ({content[:8]!r}, expected {MAGIC!r})"
        raise DataError(Problem(str(file.path), message, REMAKE))
    _, id_size, has_mask, _, *sizes = HEADER.unpack(content)
    if id_size not in (2, 4) or has_mask not in (0, 1):
        raise _damaged(file, f"the header has {id_size} bytes per id and the flag {has_mask}")
    header = Header(id_size, bool(has_mask), *sizes)
    # A later version may give these bytes a meaning that must not be ignored.
    if header.pack() != content:
        raise _damaged(file, "reserved bytes of the header are not 0")
    if header.file_size != file.size:
        message = f"{header.samples} samples and {header.tokens} tokens need {header.file_size} bytes"
        raise _damaged(file, f"{message}, the file has {file.size}")
    return header


class _Reader:
    """Decoder of an open file."""

    def __init__(self, opened: OpenFile) -> None:
        self._opened = opened
        self._header = _read_header(opened.file, opened.read(0, HEADER.size))
        self._dtype, self._id_size = self._header.dtype, self._header.id_size

    def read(self, span: Span, begin: int, stop: int) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, int64 or unsigned [stop - begin]."""
        size = self._id_size
        content = self._opened.read(span.offset + begin * size, max(stop - begin, 0) * size)
        tokens = np.frombuffer(content, self._dtype)
        if self._header.has_mask and len(tokens):
            tokens = tokens.astype(np.int64)
            first = (span.offset - HEADER.size) // size + begin
            # The mask is a second read, but files without such tokens have none.
            is_input = self._is_input(first, len(tokens))
            np.negative(tokens, out=tokens, where=is_input)
            tokens[is_input & (tokens == 0)] = INPUT_ONLY_ZERO
        return tokens

    def _is_input(self, first: int, count: int) -> np.ndarray:
        """Return whether each of ``count`` tokens from token ``first`` of the file is an input only."""
        byte, bit = divmod(first, 8)
        content = self._opened.read(self._header.mask_at + byte, -(-(bit + count) // 8))
        bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
        return bits[bit : bit + count].view(bool)


def write_tokens(path: Path, samples: Iterable[np.ndarray], largest: int) -> tuple[int, int]:
    """Write a binary token file, in memory of an eighth of a byte per token and four bytes per sample.

    Args:
        path: File to create, which must not exist.
        samples: Token ids of each sample; negative ones are inputs only.
        largest: Largest absolute value of an id, which decides between 2 and 4 bytes.

    Returns:
        The numbers of samples and of tokens.

    Raises:
        ValueError: An id is beyond ``largest`` or 31 bits, or a sample too long.
        OSError: The file cannot be written.
    """
    if largest > LARGEST_ID:
        raise ValueError(f"token {largest} has more than 31 bits")
    id_size = 2 if largest <= LARGEST_SHORT else 4
    lengths: list[int] = []
    with path.open("xb") as stream:
        # The header is known last. Until then the file begins with zeros, which no reader accepts.
        stream.write(bytes(HEADER.size))
        mask = _write_ids(stream, samples, largest, np.dtype(f"<u{id_size}"), lengths)
        has_mask = any(chunk.strip(b"\0") for chunk in mask)
        if has_mask:
            stream.writelines(mask)
        index = np.asarray(lengths, "<u4").tobytes()
        stream.write(index)
        header = Header(id_size, has_mask, len(lengths), sum(lengths), 0)
        stream.seek(0)
        stream.write(header._replace(checksum=header.checksum_with(index)).pack())
    return header.samples, header.tokens


def _write_ids(
    stream: BinaryIO, samples: Iterable[np.ndarray], largest: int, dtype: np.dtype, lengths: list[int]
) -> list[bytes]:
    """Write the ids of all samples, append their lengths, and return the mask in chunks of whole bytes."""
    mask: list[bytes] = []
    rest = np.empty(0, bool)  # bits of the byte that is not complete yet
    for tokens in samples:
        ids = input_ids(tokens)
        if len(tokens) > LONGEST or ids.max(initial=0) > largest or ids.min(initial=0) < 0:  # abs(-2^63) is negative
            raise ValueError(f"a sample of {len(tokens)} tokens has ids beyond {largest}")
        stream.write(ids.astype(dtype).data)
        lengths.append(len(tokens))
        bits = np.concatenate([rest, tokens < 0])
        whole = len(bits) // 8 * 8
        mask.append(np.packbits(bits[:whole], bitorder="little").tobytes())
        rest = bits[whole:]
    return [*mask, np.packbits(rest, bitorder="little").tobytes()]
