"""Best-fit packing: whole samples are divided among rows such that little padding is left (arXiv 2404.10830).

Samples that are longer than a sequence are cut into pieces of its length and a rest. No other sample is cut. Pieces are
placed by best-fit decreasing: the longest first, each in the row with the least space that is enough.

Shapes: N samples, B rows, Q pieces in all rows.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from internlm.data.order import Piece, SampleOrder
from internlm.data.permutation import KeyedPermutation, Purpose

# Samples that are divided among rows together. More leave hardly less padding, but rows of similar samples: all of the
# longest ones come first.
WINDOW = 1 << 16


@dataclass(frozen=True)
class Bins:
    """Rows of whole samples: row b has the pieces [``starts[b]``, ``starts[b + 1]``)."""

    starts: np.ndarray  # [B + 1] int64
    samples: np.ndarray  # [Q] int64, sample of each piece
    parts: np.ndarray  # [Q] int32, which of the pieces of its sample, counted from 0
    tokens: np.ndarray  # [B] int64, tokens of each row
    lengths: np.ndarray  # [N] int64, tokens of each sample
    seq_len: int  # tokens of each piece, except the last of a sample

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    def pieces(self, row: int) -> list[Piece]:
        """Return the pieces of a row."""
        some = slice(self.starts[row], self.starts[row + 1])
        samples = self.samples[some]
        lengths = np.asarray(self.lengths[samples])
        begins = self.parts[some] * self.seq_len
        stops = np.minimum(begins + self.seq_len, lengths)
        columns = (samples, lengths, begins, stops)
        return [Piece(*piece) for piece in zip(*(column.tolist() for column in columns), strict=True)]


class BinOrder:
    """Order of rows that samples have been packed into.

    Args:
        bins: The rows.
        order: Order of their indices.
    """

    def __init__(self, bins: Bins, order: SampleOrder) -> None:
        self.bins, self._order = bins, order

    def between(self, start: int, stop: int) -> list[Piece]:
        """Return the pieces of the rows at positions [``start``, ``stop``); a row counts as one token."""
        return self.samples(start, stop)

    def samples(self, first: int, stop: int) -> list[Piece]:
        """Return the pieces of the rows at positions [``first``, ``stop``)."""
        return [piece for row in self._order.samples(first, stop) for piece in self.bins.pieces(row.sample)]


def pack(lengths: np.ndarray, seq_len: int, packed_length: int, seed: int, members: np.ndarray | None = None) -> Bins:
    """Divide samples among rows.

    Args:
        lengths: Tokens of each sample, [N].
        seq_len: Length above which samples are cut.
        packed_length: Tokens of a row.
        seed: Seed of the order in which samples are taken, so that a row has samples of several files.
        members: Indices of the samples to use; None: all.
    """
    # In a shuffled order, as neighbours in a file are alike: a row then has samples from all over the dataset.
    members = np.arange(len(lengths)) if members is None else members
    permutation = KeyedPermutation(len(members), seed, Purpose.BINS)
    windows = (
        members[permutation(np.arange(first, min(first + WINDOW, len(members))))]
        for first in range(0, max(len(members), 1), WINDOW)
    )
    return joined([_pack_window(lengths, window, seq_len, packed_length) for window in windows])


def joined(parts: list[Bins]) -> Bins:
    """Return the rows of all ``parts``, one part after the other."""
    before = np.cumsum([0, *(len(part.samples) for part in parts)])
    starts = [part.starts[:-1] + pieces for part, pieces in zip(parts, before, strict=False)]
    return Bins(
        starts=np.concatenate([*starts, before[-1:]]),
        samples=np.concatenate([part.samples for part in parts]),
        parts=np.concatenate([part.parts for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        lengths=parts[0].lengths,
        seq_len=parts[0].seq_len,
    )


def _pack_window(lengths: np.ndarray, samples: np.ndarray, seq_len: int, packed_length: int) -> Bins:
    whole = np.asarray(lengths[samples])
    counts = -(-whole // seq_len)
    samples, whole = np.repeat(samples, counts), np.repeat(whole, counts)
    parts = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(whole - parts * seq_len, seq_len)
    # Stable sorts, so that equal samples keep their order on any version of NumPy.
    longest_first = np.argsort(-sizes, kind="stable")
    rows = _best_fit(sizes[longest_first].tolist(), packed_length)
    pieces = longest_first[np.argsort(rows, kind="stable")]
    count = int(rows.max(initial=-1)) + 1
    starts = np.cumsum([0, *np.bincount(rows, minlength=count)])
    tokens = np.bincount(rows, weights=sizes[longest_first], minlength=count).astype(np.int64)
    return Bins(starts, samples[pieces], parts[pieces].astype(np.int32), tokens, lengths, seq_len)


def _best_fit(sizes: list[int], capacity: int) -> np.ndarray:
    """Return the row of each size, [number of sizes]; sizes are descending, and at most ``capacity``."""
    spaces: list[int] = []  # the different spaces that are left in rows, ascending
    rows_with: dict[int, list[int]] = {}  # rows by the space that is left in them
    result, count = [], 0
    # A search tree over the spaces would be of no use: there are at most as many as tokens in a row, mostly few.
    for size in sizes:
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            row, space, count = count, capacity, count + 1
        else:
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[at]
        result.append(row)
        if space > size:
            rest = space - size
            if rest not in rows_with:
                rows_with[rest] = []
                bisect.insort(spaces, rest)
            rows_with[rest].append(row)
    return np.array(result, np.int64)
