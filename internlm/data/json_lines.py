"""JSON-lines token files: ``X.bin``, one JSON line per sample, and ``X.bin.meta``, a NumPy array [n, 2].

A row of the ``.meta`` is the byte offset of a line and its number of tokens. Pieces of a long line are found by
counting its commas once: only the bytes of a piece are read and parsed afterwards.

Shapes: n samples in a file, B blocks of a long line.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internlm.data.token_files import DataFile, OpenFile, SampleError, Span
from internlm.utils.errors import DataError, Problem

REMAKE = "Recreate the .bin and .bin.meta files with `internlm tokenize`"
# Bounds of a plausible .meta, checked without reading the .bin: the least and the most bytes of a token (a digit and a
# comma; a sign, 19 digits, a comma and blanks), and the most bytes of a line besides its tokens.
LEAST_BYTES, MOST_BYTES, MOST_EXTRA = 2, 32, 4096
#: Bytes from which a line is long: parsing it whole for each piece would take several times as long as the piece.
LONG_LINE = 1 << 16
#: Bytes of a long line for which the commas before them are remembered.
COMMA_BLOCK = 1 << 14
REMEMBERED = 64  # long lines per open file; threads that read ahead are in different ones

_HEADER = re.compile(
    rb"\{'descr': '([<>|]?[iu][1248])', 'fortran_order': (True|False), 'shape': \((\d{1,18}), 2\), \} *\n"
)
_LINE_BEGIN = re.compile(rb'\s*\{\s*"tokens"\s*:\s*\[\s*')
_LINE_END = re.compile(rb"\s*\]\s*\}\s*\Z")


class JsonLines:
    """Format of JSON lines, whose samples a ``.meta`` file lists."""

    name = "json"
    suffix = ".bin"
    remake = REMAKE

    def side(self, path: Path) -> Path:
        """Return the path of the ``.meta`` of a ``.bin``."""
        return path.with_name(path.name + ".meta")

    def samples(self, file: DataFile) -> np.ndarray:
        """Read the ``.meta``, and check that it matches the ``.bin``; return offset, token count and size [3, n].

        Raises:
            DataError: The ``.meta`` is not an integer array of shape [n, 2], or does not match.
        """
        offsets, lengths = open_meta(file).T
        sizes = np.diff(offsets, append=file.size)
        wrong = (offsets < 0) | (sizes < 1) | (sizes < LEAST_BYTES * lengths)
        wrong |= (sizes > MOST_BYTES * lengths + MOST_EXTRA) | (lengths < 0) | (lengths > file.size)
        if wrong.any():
            row = int(wrong.argmax())
            message = f"sample {row} at byte {offsets[row]} cannot have {lengths[row]} tokens in {sizes[row]} bytes"
            raise _disagree(file, message)
        if not _last_line_is_whole(file, offsets):
            message = f"the last sample (sample {len(offsets) - 1}) does not end where the file ends"
            raise _disagree(file, message if len(offsets) else "it lists no samples, but the file is not empty")
        return np.stack([offsets, lengths, sizes])

    def reader(self, opened: OpenFile) -> _Reader:
        """Return the decoder of an open ``.bin``."""
        return _Reader(opened)


def _disagree(file: DataFile, message: str) -> DataError:
    return DataError(Problem(str(file.side), f"does not match {file.path.name} ({file.size} bytes): {message}", REMAKE))


def _last_line_is_whole(file: DataFile, offsets: np.ndarray) -> bool:
    if not len(offsets):
        return file.size == 0
    with file.open() as stream:
        stream.seek(int(offsets[-1]))
        line = stream.read().rstrip()
    return b"\n" not in line and line.endswith(b"}")


def open_meta(file: DataFile) -> np.ndarray:
    """Read the ``.meta`` of a file without comparing it with the ``.bin``: int64 [n, 2].

    Raises:
        DataError: It is missing, or not an integer array of this shape.
    """
    path = file.side
    with file.open_side() as stream:
        content = stream.read()
    try:
        meta = _plain_array(path, content)
    # NumPy's parser of headers raises errors of many types, those of Python's tokenizer among them.
    except Exception as error:
        message = f"is not a plain NumPy array of byte offsets and token counts ({_first_line(error)})"
        raise DataError(Problem(str(path), message, f"Pickled arrays are refused. {REMAKE}")) from error
    if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
        message = f"expected integers of shape [samples, 2], got {meta.dtype} of shape {list(meta.shape)}"
        raise DataError(Problem(str(path), message, REMAKE))
    return meta.astype(np.int64)


def _plain_array(path: Path, content: bytes) -> np.ndarray:
    """Decode an ``.npy`` file, and never allocate more than its size."""
    size = int.from_bytes(content[8:10], "little")
    header = _HEADER.fullmatch(content, 10, 10 + size) if content[:8] == b"\x93NUMPY\x01\x00" else None
    if header is not None:  # NumPy takes a tenth of a millisecond to parse a header
        rows, dtype = int(header[3]), np.dtype(header[1].decode())
        if len(content) == 10 + size + 2 * rows * dtype.itemsize:
            values = np.frombuffer(content, dtype, offset=10 + size)
            return values.reshape(2, rows).T if header[2] == b"True" else values.reshape(rows, 2)
    # np.load can unpickle object arrays, and allocates any size that a forged header declares. open_memmap does
    # neither.
    return np.lib.format.open_memmap(path, mode="r")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


# -- samples


class _LongLine(NamedTuple):
    """Where the tokens of a long line begin and end, and how many commas lie before each block of it."""

    begin: int  # byte of the line at which the first token begins
    end: int  # byte after the last token
    commas: np.ndarray  # [B + 1] commas before each block of COMMA_BLOCK bytes from ``begin``


class _Reader:
    """Decoder of an open ``.bin``."""

    def __init__(self, opened: OpenFile) -> None:
        self._opened = opened
        self._long_line = functools.lru_cache(REMEMBERED)(self._scan)
        self._whole = functools.lru_cache(2)(self._parse_whole)
        self._lock = threading.Lock()

    def read(self, span: Span, begin: int, stop: int) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, int64 [stop - begin]."""
        if span.size < LONG_LINE:
            return self._parse_whole(span)[begin:stop]
        # Rows of a document follow one another, so that the few last lines suffice.
        with self._lock:  # a cache alone would let every waiting thread read the same line
            line = self._long_line(span)
            if line is None:
                return self._whole(span)[begin:stop]
        if begin >= stop:
            return np.empty(0, np.int64)
        text = self._piece(span, line, begin, stop)
        tokens = _parse(b'{"tokens": [' + text + b"]}")
        if len(tokens) != stop - begin:
            raise SampleError(f"expected {stop - begin} tokens from token {begin}, got {len(tokens)}", REMAKE)
        return tokens

    def _parse_whole(self, span: Span) -> np.ndarray:
        tokens = _parse(self._opened.read(span.offset, span.size))
        if len(tokens) != span.length:
            meta = self._opened.file.side.name
            raise SampleError(f"expected {span.length} tokens as in {meta}, got {len(tokens)}", REMAKE)
        return tokens

    def _scan(self, span: Span) -> _LongLine | None:
        """Count the commas of a long line; return None if it is not a plain list of ``span.length`` integers."""
        line = self._opened.read(span.offset, span.size)
        # Any other JSON is parsed whole, so what is fast here need not be general.
        head, tail = _LINE_BEGIN.match(line), _LINE_END.search(line, max(0, len(line) - MOST_EXTRA))
        if head is None or tail is None:
            return None
        begin, end = head.end(), tail.start()
        body = np.frombuffer(line, np.uint8, end - begin, begin)
        # Digits, signs, commas and blanks: all other characters of JSON come after "9".
        if body.max(initial=0) > ord("9"):
            return None
        blocks = [np.count_nonzero(body[at : at + COMMA_BLOCK] == ord(",")) for at in range(0, len(body), COMMA_BLOCK)]
        commas = np.cumsum([0, *blocks])
        return _LongLine(begin, end, commas) if commas[-1] + 1 == span.length else None

    def _piece(self, span: Span, line: _LongLine, begin: int, stop: int) -> bytes:
        """Read the text of tokens [``begin``, ``stop``), of which there is at least one."""
        # Token t > 0 begins after comma t, counted from 1, and the piece ends before comma ``stop``.
        first = int(np.searchsorted(line.commas, begin)) - 1 if begin else 0
        last = int(np.searchsorted(line.commas, stop)) - 1 if stop < span.length else len(line.commas) - 2
        at = line.begin + first * COMMA_BLOCK
        until = min(line.begin + (last + 1) * COMMA_BLOCK, line.end)
        text = self._opened.read(span.offset + at, until - at)
        places = np.flatnonzero(np.frombuffer(text, np.uint8) == ord(","))
        before = int(line.commas[first])
        if len(places) < min(stop, span.length - 1) - before:
            raise SampleError("the content has changed since the commas of the line were counted", REMAKE)
        from_byte = int(places[begin - before - 1]) + 1 if begin else 0
        return text[from_byte : int(places[stop - before - 1]) if stop < span.length else len(text)]


def _parse(line: bytes) -> np.ndarray:
    try:
        tokens = json.loads(line)["tokens"]
        if type(tokens) is list:
            return np.frombuffer(array("q", tokens), np.int64)
        found = np.asarray(tokens)
    except (TypeError, OverflowError) as error:  # not all are integers of 64 bits
        found = _as_array(line, error)
    except (ValueError, KeyError, RecursionError) as error:
        raise _not_a_line(error) from error
    # NumPy would silently turn [1, 2.5] into floats and [1, "2"] into strings.
    message = f"expected a list of integers as tokens, got {found.dtype} of shape {list(found.shape)}"
    raise SampleError(message, REMAKE)


def _as_array(line: bytes, reason: Exception) -> np.ndarray:
    """Return the tokens of a line as NumPy reads them, for the error."""
    try:
        return np.asarray(json.loads(line)["tokens"])
    except (ValueError, TypeError, KeyError) as error:
        raise _not_a_line(error) from reason


def _not_a_line(error: Exception) -> SampleError:
    return SampleError(f'is not a JSON line {{"tokens": [...]}} ({type(error).__name__}: {error})', REMAKE)
