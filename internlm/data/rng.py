"""Reproducible numbers for the data: by purpose and index, the same with every version of NumPy."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for. Each purpose has streams of its own."""

    ORDER = 0  # of the samples in an epoch
    LENGTHS = 1  # of random samples
    TOKENS = 2  # of a random sample


def raw_numbers(count: int, seed: int, purpose: Purpose, index: int = 0) -> np.ndarray:
    """``count`` uniform uint64 numbers."""
    # NumPy keeps its raw bit streams stable, but not what its distributions make of them (NEP 19).
    stream = np.random.SeedSequence(seed, spawn_key=(purpose, index))
    return np.random.PCG64(stream).random_raw(count)
