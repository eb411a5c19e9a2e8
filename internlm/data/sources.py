"""Sample sources: their protocol, a source of random samples, and a view of one dataset type.

Shapes: N samples in the source.
"""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np

from internlm.data.permutation import Purpose, raw_numbers

#: Id in a sample of token 0 as an input only, which has no negative. It lies outside of every vocabulary.
INPUT_ONLY_ZERO = -(2**31)

LONGEST_PATTERN = 8  # tokens; short enough that a tiny model learns to repeat it within a few steps


class SampleReader(Protocol):
    """Protocol for what fills rows with samples: tokens and dataset types of samples by index."""

    type_ids: np.ndarray  # [N] index into types

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, integers [stop - begin]; by default all.

        A negative id ``-t`` stands for token ``t``, which is an input but is ignored as a label, and
        :data:`INPUT_ONLY_ZERO` for such a token 0.
        """


class SampleSource(SampleReader, Protocol):
    """Protocol for a random-access sample source; every method is a pure function of the dataset."""

    types: list[str]  # names of the dataset types
    lengths: np.ndarray  # [N] int64, tokens per sample

    def fingerprint(self) -> str:
        """Return a digest that changes when the samples, their order or their lengths change."""


@runtime_checkable
class ListsFiles(Protocol):
    """Protocol for sources and rows that are read from files."""

    def files(self) -> str:
        """Return the list of the files for checkpoints, so that a later run can name those that have changed."""


def input_ids(tokens: np.ndarray) -> np.ndarray:
    """Return the ids that are inputs of the model, from the ids of a sample, of which negative ones are inputs only."""
    return np.where(tokens == INPUT_ONLY_ZERO, 0, np.abs(tokens))


class RandomSource:
    """Source of random samples, reproducible from the seed.

    Each sample repeats a short pattern in which small ids are more frequent, so that a model can learn something. If
    ``fixed_length`` is set, each sample instead has exactly ``seq_len`` tokens, drawn uniformly and independently.

    Args:
        seed: Seed for the lengths and the tokens.
        vocab_size: Exclusive upper bound of the token ids.
        seq_len: Maximum number of tokens of a sample.
        fixed_length: Draw ``seq_len`` uniform tokens for every sample.
        type_name: Name of the single dataset type.
        samples: Number of samples.
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

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, integers [stop - begin]; by default all."""
        return self._tokens(sample)[begin:stop]

    def _tokens(self, sample: int) -> np.ndarray:
        length = int(self.lengths[sample])
        count = length if self._fixed_length else LONGEST_PATTERN + 1
        raw = raw_numbers(count, self._seed, Purpose.TOKENS, sample)
        if self._fixed_length:
            return (raw % self._vocab_size).astype(np.int64)
        size = 2 + int(raw[0]) % (LONGEST_PATTERN - 1)
        uniform = (raw[1 : 1 + size] >> 11) * 2.0**-53  # [size] in [0, 1): 53 bits are exact in float64
        # The square of a uniform number has density 1 / (2·sqrt(u)), which favours small ids.
        return np.resize((uniform * uniform * self._vocab_size).astype(np.int64), length)

    def fingerprint(self) -> str:
        """Return a digest of the seed, the vocabulary size and the length settings."""
        return hashlib.blake2b(repr(self._settings).encode(), digest_size=16).hexdigest()


class OneType:
    """Sample source that contains only the samples of one dataset type of another source, in their original order.

    Args:
        source: Source of all samples.
        type_name: Dataset type.
        samples: Indices of its samples in ``source``, ascending; None: search for them.
    """

    def __init__(self, source: SampleSource, type_name: str, samples: np.ndarray | None = None) -> None:
        self._source = source
        if samples is None:
            samples = np.flatnonzero(source.type_ids == source.types.index(type_name))
        self._samples = samples
        self.types = [type_name]
        self.lengths = source.lengths[_as_slice(samples)]  # [N]
        self.type_ids = np.zeros(len(samples), np.int16)  # [N]

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, integers [stop - begin]; by default all."""
        return self._source.read(int(self._samples[sample]), begin, stop)

    def fingerprint(self) -> str:
        """Return the fingerprint of the underlying source, which covers the samples of all its types."""
        return self._source.fingerprint()


def _as_slice(samples: np.ndarray) -> slice | np.ndarray:
    """Return a slice for consecutive indices, which selects without a copy."""
    if len(samples) and samples[-1] - samples[0] == len(samples) - 1:  # ascending
        return slice(int(samples[0]), int(samples[-1]) + 1)
    return samples
