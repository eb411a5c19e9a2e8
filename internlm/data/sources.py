"""Sources of samples: the interface, random data, and a part of another source.

N: samples of the source.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

from internlm.data.rng import Purpose, raw_numbers

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
