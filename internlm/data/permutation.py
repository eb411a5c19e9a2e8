"""Keyed permutation: a shuffled order of any size whose elements are computed one by one, without a list of all.

It is a Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom
functions") over the smallest power of two that covers the size. The functions of its rounds are tables of random
numbers. Values beyond the size are permuted again until they are within it (cycle walking; Black and Rogaway 2002,
"Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

ROUNDS = 6  # even, since a round exchanges the widths of the two halves; four suffice for large sizes
LEAST_BITS = 6  # with fewer, some orders of a few elements would be more frequent than others
CHUNK = 1 << 14  # elements permuted at once, so that intermediate arrays stay in the processor's cache


class Purpose(IntEnum):
    """Purpose of a random stream; streams are independent, so drawing from one stream does not advance the others."""

    ORDER = 0  # order of the samples in an epoch
    LENGTHS = 1  # lengths of random samples
    TOKENS = 2  # tokens of a random sample
    BINS = 3  # order of the samples that best-fit packing divides among rows
    UNITS = 4  # order of the units of text files in an epoch
    DOCUMENTS = 5  # order of the documents in a block of a shard


def raw_numbers(count: int, seed: int, purpose: Purpose, *index: int) -> np.ndarray:
    """Draw uniform uint64 numbers, [count], from the random stream (seed, purpose, index).

    The numbers do not depend on the version of NumPy.
    """
    # NumPy promises stable bit streams, but not stable distributions (NEP 19). If an upgrade changed the order of
    # samples, a resumed run would repeat some samples and miss others.
    stream = np.random.SeedSequence(seed, spawn_key=(purpose, *(index or (0,))))
    return np.random.PCG64(stream).random_raw(count)


class KeyedPermutation:
    """Permutation of ``range(size)`` that depends on a key.

    Args:
        size: Number of elements.
        seed: Seed of the run.
        purpose: Purpose of the permutation.
        index: Further parts of the key, such as the number of the epoch.
    """

    def __init__(self, size: int, seed: int, purpose: Purpose, *index: int) -> None:
        self.size = size
        bits = max(LEAST_BITS, (size - 1).bit_length())
        self._widths = bits // 2, bits - bits // 2
        # Each round looks up one half, and changes the other with what it finds; then they exchange places.
        lengths = [1 << self._widths[(number + 1) % 2] for number in range(ROUNDS)]
        numbers = raw_numbers(sum(lengths), seed, purpose, *index)
        masks = [(1 << self._widths[number % 2]) - 1 for number in range(ROUNDS)]
        parts = np.split(numbers, np.cumsum(lengths)[:-1])
        # The high bits, which are the better ones of most generators.
        self._tables = [(part >> 32).astype(np.int64) & mask for part, mask in zip(parts, masks, strict=True)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the elements at ``positions``, both int64 of one shape [n]."""
        # Less than half of the covering power of two is outside, so few values are permuted more than twice.
        result = np.empty(len(positions), np.int64)
        for start in range(0, len(positions), CHUNK):
            values = self._permute(positions[start : start + CHUNK].astype(np.int64))
            outside = np.flatnonzero(values >= self.size)
            while len(outside):
                values[outside] = self._permute(values[outside])
                outside = outside[values[outside] >= self.size]
            result[start : start + CHUNK] = values
        return result

    def _permute(self, values: np.ndarray) -> np.ndarray:
        """Permute the numbers below the covering power of two."""
        low, high = self._widths[1], self._widths[0]
        left, right = values >> low, values & ((1 << low) - 1)
        for table in self._tables:
            left, right = right, left ^ table[right]
            low, high = high, low
        return (left << low) | right
