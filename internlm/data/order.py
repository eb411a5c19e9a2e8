"""Order of the samples in an epoch, with random access by position and by token.

Shapes: N samples in an epoch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import numpy as np

from internlm.data.permutation import KeyedPermutation, Purpose

BLOCK = 1 << 14  # samples per block: one prefix sum is kept per block, and a block is expanded to find a token
CACHED_BLOCKS = 8  # for threads that read ahead, and the next block


class Piece(NamedTuple):
    """Tokens [``begin``, ``stop``) of a sample, of which the order uses ``length`` tokens."""

    sample: int
    length: int
    begin: int
    stop: int


class SampleOrder(Protocol):
    """Protocol for a fixed sequence of samples, whose tokens form one stream."""

    def between(self, start: int, stop: int) -> list[Piece]:
        """Return the pieces that tokens [``start``, ``stop``) of the stream consist of; none beyond its end."""

    def samples(self, first: int, stop: int) -> list[Piece]:
        """Return the samples at positions [``first``, ``stop``) of the sequence, as whole pieces."""


class Block(NamedTuple):
    """Consecutive samples of a sequence."""

    samples: np.ndarray  # [n] sample indices
    lengths: np.ndarray  # [n] tokens used of each sample
    ends: np.ndarray  # [n] tokens of the stream up to and including the sample

    def between(self, start: int, stop: int) -> list[Piece]:
        """Return the pieces of those tokens [``start``, ``stop``) of the stream that are in this block."""
        some = slice(self.ends.searchsorted(start, "right"), self.ends.searchsorted(stop) + 1)
        pieces = []
        for sample, length, end in zip(*(column[some].tolist() for column in self), strict=True):
            begin, until = max(start, end - length), min(stop, end)
            if begin < until:  # a sample without tokens has no piece
                pieces.append(Piece(sample, length, begin + length - end, until + length - end))
        return pieces

    def whole(self, first: int, stop: int) -> list[Piece]:
        """Return the samples at positions [``first``, ``stop``) of this block, as whole pieces."""
        pairs = zip(self.samples[first:stop].tolist(), self.lengths[first:stop].tolist(), strict=True)
        return [Piece(sample, length, 0, length) for sample, length in pairs]


class EpochOrder:
    """Order of all samples of a source in one epoch.

    Args:
        lengths: Tokens of each sample, int64 [N].
        longest: Number of tokens after which samples are truncated; None: whole samples.
        permutation: Permutation of the samples; None: the order of the source.
    """

    def __init__(self, lengths: np.ndarray, longest: int | None, permutation: KeyedPermutation | None) -> None:
        self._lengths, self._longest, self._permutation = lengths, longest, permutation
        self._block = functools.lru_cache(CACHED_BLOCKS)(self._expand)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._lengths)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Tokens of the stream before each block, and before its end."""
        blocks = range(0, len(self), BLOCK)
        return np.cumsum([0, *(int(self._lengths_of(self._samples(first, first + BLOCK)).sum()) for first in blocks)])

    def prepare(self) -> EpochOrder:
        """Return this order with its prefix sums, which threads would otherwise all compute at their first use."""
        _ = self._starts
        return self

    def between(self, start: int, stop: int) -> list[Piece]:
        """Return the pieces that tokens [``start``, ``stop``) of the epoch consist of; none beyond its end."""
        first = max(int(self._starts.searchsorted(start, "right")) - 1, 0)
        last = min(int(self._starts.searchsorted(stop)), len(self._starts) - 1)
        return [piece for number in range(first, last) for piece in self._block(number).between(start, stop)]

    def samples(self, first: int, stop: int) -> list[Piece]:
        """Return the samples at positions [``first``, ``stop``) of the epoch, as whole pieces."""
        samples = self._samples(first, stop)
        return Block(samples, self._lengths_of(samples), samples).whole(0, len(samples))

    def _samples(self, first: int, stop: int) -> np.ndarray:
        positions = np.arange(first, max(first, min(stop, len(self))))
        return positions if self._permutation is None else self._permutation(positions)

    def _lengths_of(self, samples: np.ndarray) -> np.ndarray:
        # Lengths are memory-mapped: only those of the block are read.
        lengths = np.asarray(self._lengths[samples])
        return lengths if self._longest is None else np.minimum(lengths, self._longest)

    def _expand(self, number: int) -> Block:
        # A block takes about a millisecond, and consecutive rows need the same one: hence the cache.
        samples = self._samples(number * BLOCK, (number + 1) * BLOCK)
        lengths = self._lengths_of(samples)
        return Block(samples, lengths, np.cumsum(lengths) + self._starts[number])


def shuffled(lengths: np.ndarray, longest: int | None, seed: int, index: int) -> EpochOrder:
    """Return the order of epoch ``index``: a function of the number of samples, ``seed`` and ``index``."""
    return EpochOrder(lengths, longest, KeyedPermutation(len(lengths), seed, Purpose.ORDER, index))
