"""Fingerprints of training data, made from tokens rather than from files: a copy, or a converted folder, has the same.

A fingerprint has up to three levels, each a digest: ``stat`` of the names and of the lengths of all samples,
``sampled`` of some tokens of each file too, ``full`` of every byte. Runs compare the levels that both have, so that
``data.fingerprint`` may change between them.

Shapes: n samples in a file, B blocks of a file.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

from internlm.data.token_files import (
    CHECK_BLOCK,
    DataFile,
    OpenFile,
    SampleError,
    Span,
    TokenReader,
    block_checksums,
)

Level = Literal["stat", "sampled", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)

#: Tokens of a file in its digest, most samples that they come from, and tokens at either end of a long sample.
SAMPLED_TOKENS, SAMPLED_ROWS, ENDS = 4096, 64, 512
#: Tokens of a file up to which all of them are in its digest.
SMALL_FILE = 16_384
#: Bytes that are read at once for checksums.
_CHUNK = 64 * CHECK_BLOCK
#: Characters beyond which a checkpoint has no list of files, and bytes of a list beyond which it is damaged.
MOST_LISTED, LARGEST_LIST = 1 << 20, 1 << 26
#: Files of a kind that an error names.
MOST_SHOWN = 5
#: Word of a fingerprint for the version of the order of samples, which is no level.
ORDER = "order"
#: Multiplier of a sequence that covers an interval evenly: 2^64 divided by the golden ratio.
_GOLDEN = 0x9E3779B97F4A7C15


class NamedFile(Protocol):
    """Protocol for a file with a name relative to the folder of the data."""

    @property
    def name(self) -> str:
        """Name of the file."""


class FileDigest(NamedTuple):
    """Digests of one file by level, as hexadecimal text; an empty text for a level that was not made."""

    stat: str
    sampled: str = ""
    full: str = ""


def digest_file(file: DataFile, samples: np.ndarray, level: Level) -> tuple[FileDigest, np.ndarray]:
    """Digest one file.

    Args:
        file: Token file.
        samples: Byte offset, token count and size in bytes of each sample, int64 [3, n].
        level: Highest level to make.

    Returns:
        The digests, and with level ``full`` the CRC-32 of each block of the file, uint32 [B]; else none, [0].

    Raises:
        DataError: The file cannot be read, or a sample is damaged.
    """
    # Tokens and lengths rather than bytes, so that a converted file has the same digest.
    stat = _hex(np.ascontiguousarray(samples[1], "<i8").data)
    if level == "stat":
        return FileDigest(stat), np.empty(0, np.uint32)
    row = 0
    tokens = hashlib.blake2b(stat.encode(), digest_size=8)
    try:
        opened = OpenFile(file)
        reader = file.format.reader(opened)
        longest = SMALL_FILE if samples[1].sum() <= SMALL_FILE else 2 * ENDS
        for row in sampled_rows(samples[1]):
            for piece in _pieces(reader, Span(*map(int, samples[[0, 2, 1], row])), longest):
                tokens.update(piece)
        sampled = tokens.hexdigest()
        if level == "sampled":
            return FileDigest(stat, sampled), np.empty(0, np.uint32)
        checksums = _checksums(opened)
    except SampleError as error:
        raise error.at(file, row, int(samples[0, row]) if samples.size else 0) from error
    return FileDigest(stat, sampled, _hex(checksums.astype("<u4").data)), checksums


def sampled_rows(lengths: np.ndarray) -> Iterator[int]:
    """Yield the rows of a file whose tokens are in its digest: all, or the first, the last and others between them."""
    count, tokens = len(lengths), 0
    rows: Iterable[int] = range(count)
    if lengths.sum() <= SMALL_FILE:
        yield from rows
        return
    if count > SAMPLED_ROWS:
        spread = ((_GOLDEN * number % (1 << 64)) * count >> 64 for number in range(1, SAMPLED_ROWS - 1))
        rows = dict.fromkeys((0, count - 1, *spread))
    for row in rows:
        yield row
        tokens += min(int(lengths[row]), 2 * ENDS)
        if tokens >= SAMPLED_TOKENS:
            return


def _pieces(reader: TokenReader, span: Span, longest: int) -> Iterator[bytes]:
    """Yield the tokens of a sample that are in the digest: all up to ``longest``, or those at both ends."""
    bounds = [(0, span.length)] if span.length <= longest else [(0, ENDS), (span.length - ENDS, span.length)]
    return (reader.read(span, begin, stop).astype("<i8").tobytes() for begin, stop in bounds)


def _checksums(opened: OpenFile) -> np.ndarray:
    size = opened.file.size
    chunks = (opened.read(at, min(_CHUNK, size - at)) for at in range(0, size, _CHUNK))
    return np.array([checksum for chunk in chunks for checksum in block_checksums(chunk)], np.uint32)


def _hex(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


# -- all files of a run


def fingerprint(files: Sequence[DataFile], digests: Iterable[FileDigest], dropped: int, level: Level) -> str:
    """Return the fingerprint of a folder, ``stat:…``, ``sampled:…`` and ``full:…`` up to ``level``.

    Args:
        files: The files, in the order of their samples.
        digests: Digests of ``files``.
        dropped: Number of samples that are too short and left out.
        level: Highest level.
    """
    stems = [file.stem for file in files]
    # Bytes are comparable only between files of one format.
    formats = "+".join(sorted({file.format.name for file in files}))
    columns = list(zip(*digests, strict=True))
    texts = []
    for name, column in zip(LEVELS[: LEVELS.index(level) + 1], columns, strict=False):
        whole = hashlib.blake2b(repr((stems, column, dropped)).encode(), digest_size=12).hexdigest()
        texts.append(f"{name}-{formats}:{whole}" if name == "full" else f"{name}:{whole}")
    return " ".join(texts)


def same_data(old: str, new: str) -> bool:
    """Return whether two fingerprints agree in every level that both have, of which there must be one.

    Other words ``name:value`` of both must agree too; a word without a colon is compared as it is.
    """
    then, now = (dict(_word(text) for text in text.split()) for text in (old, new))
    common = then.keys() & now.keys()
    return bool(common - {ORDER}) and all(then[name] == now[name] for name in common)


def _word(text: str) -> tuple[str, str]:
    name, colon, digest = text.partition(":")
    return (name, digest) if colon else ("", text)


# -- names of changed files


def file_list(files: Iterable[NamedFile], digests: Iterable[FileDigest], level: Level) -> str:
    """Return name and digest of each file as one text for checkpoints; empty if it were longer than MOST_LISTED."""
    # Level "full" depends on the format, and is part of the fingerprint.
    shown = min(LEVELS.index(level), LEVELS.index("sampled"))
    # Half of a digest suffices: the fingerprint decides whether data have changed, this list only names files.
    lines = [f"{digest[shown][:8]} {file.name}" for file, digest in zip(files, digests, strict=True)]
    text = base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()
    return f"{LEVELS[shown]}:{text}" if len(text) <= MOST_LISTED else ""


class FileChanges(NamedTuple):
    """Names of the files that differ between a checkpoint and a run."""

    changed: list[str]
    added: list[str]
    removed: list[str]

    def __str__(self) -> str:
        kinds = ((name, getattr(self, name)) for name in self._fields)
        return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def file_changes(old: str, new: str) -> FileChanges | None:
    """Compare two lists that :func:`file_list` has made; return None if they are not comparable.

    Args:
        old: List of a checkpoint. Not trusted.
        new: List of this run.
    """
    then, now = _entries(old), _entries(new)
    if then is None or now is None or old.partition(":")[0] != new.partition(":")[0]:
        return None
    # By names without suffix: converted files are no changes.
    return FileChanges(
        [name for stem, (name, digest) in now.items() if stem in then and then[stem][1] != digest],
        [name for stem, (name, _) in now.items() if stem not in then],
        [name for stem, (name, _) in then.items() if stem not in now],
    )


def _entries(text: str) -> dict[str, tuple[str, str]] | None:
    """Return name and digest by name without suffix; None if the list is damaged."""
    try:
        packed = base64.b64decode(text.partition(":")[2], validate=True)
        # A few bytes can unpack to any size.
        unpacked = zlib.decompressobj().decompress(packed, LARGEST_LIST).decode()
    except (ValueError, zlib.error):
        return None
    pairs = [line.partition(" ") for line in unpacked.split("\n")]
    if not all(name.isprintable() and name for _, _, name in pairs):
        return None
    return {name.rpartition(".")[0]: (name, digest) for digest, _, name in pairs}
