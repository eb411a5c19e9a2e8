"""Packing: how samples become rows. Pure functions of the lengths, the order and a row's number.

A row is made in three steps: (1) which pieces of which samples it holds, (2) their tokens, types and labels, (3)
where its attention is cut, which gives ``cu_seqlens`` and the positions. The layouts differ in (1) and (3) only.

N: samples of an epoch, P: packed_length = seq_len · micro_bsz, C: cuts of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from internlm.data.sources import Purpose, SampleSource, raw_numbers

IGNORED = -100  # label that takes no part in the loss
PAD = 0  # input where a row holds no sample


class Layout(Enum):
    """How samples share a row."""

    PACKED = "packed"  # one token stream; attention within each sample, in pieces of at most seq_len
    WINDOWS = "windows"  # one token stream; attention over each whole seq_len window, across samples
    PADDED = "padded"  # micro_bsz samples, each cut off at seq_len or padded to it


@dataclass(frozen=True)
class RowShape:
    """Sizes and layout of a row, in tokens and sequences."""

    seq_len: int
    micro_bsz: int
    layout: Layout

    @property
    def packed_length(self) -> int:
        """Tokens in a row."""
        return self.seq_len * self.micro_bsz


class Epoch(NamedTuple):
    """One pass over the samples: which follow one another, and how much of each is used."""

    order: np.ndarray  # [N] sample numbers
    lengths: np.ndarray  # [N] tokens used of each, in that order
    ends: np.ndarray  # [N] tokens up to and including each


class Piece(NamedTuple):
    """Tokens ``begin`` to ``stop`` of a sample of ``length`` tokens, placed at ``at`` in the row."""

    sample: int
    length: int
    begin: int
    stop: int
    at: int


class Row(NamedTuple):
    """One row of a micro-batch."""

    input_ids: np.ndarray  # [P] int64
    labels: np.ndarray  # [P] int64, the next token or IGNORED
    indexes: np.ndarray  # [P] int64, position within the attention window
    type_ids: np.ndarray  # [P] int64, data-set type
    cu_seqlens: np.ndarray  # [C] int32, bounds of the attention windows: 0, ..., P


def make_epoch(lengths: np.ndarray, shape: RowShape, seed: int | None, number: int) -> Epoch:
    """Epoch ``number`` over samples of these lengths: shuffled by (seed, number), in order where ``seed`` is None."""
    order = np.flatnonzero(lengths)
    if seed is not None:
        order = order[np.argsort(raw_numbers(len(order), seed, Purpose.ORDER, number), kind="stable")]
    used = lengths[order]
    if shape.layout is Layout.PADDED:
        used = np.minimum(used, shape.seq_len)
    return Epoch(order, used, np.cumsum(used))


def count_rows(lengths: np.ndarray, shape: RowShape) -> int:
    """Rows of an epoch; the last one is padded."""
    if shape.layout is Layout.PADDED:
        return -(-int(np.count_nonzero(lengths)) // shape.micro_bsz)
    return -(-int(lengths.sum()) // shape.packed_length)


def make_row(source: SampleSource, epoch: Epoch, shape: RowShape, number: int) -> Row:
    """Row ``number`` of an epoch; beyond its last row, one of pads alone."""
    find_pieces, find_cuts = _LAYOUTS[shape.layout]
    pieces = find_pieces(epoch, shape, number)
    input_ids, labels, type_ids = _fill(source, pieces, shape)
    cuts = np.asarray(find_cuts(pieces, shape), np.int32)
    indexes = np.arange(shape.packed_length) - np.repeat(cuts[:-1], np.diff(cuts))
    return Row(input_ids, labels, indexes, type_ids, cuts)


# -- (1) pieces


def _stream_pieces(epoch: Epoch, shape: RowShape, number: int) -> list[Piece]:
    """All tokens of the epoch are one stream, of which the row is the stretch ``start`` to ``stop``."""
    start = number * shape.packed_length
    stop = min(start + shape.packed_length, int(epoch.ends[-1]))
    if start >= stop:
        return []
    first, last = np.searchsorted(epoch.ends, (start + 1, stop))
    pieces = []
    for k in range(first, last + 1):
        length, end = int(epoch.lengths[k]), int(epoch.ends[k])
        sample_start = end - length
        begin, until = max(start, sample_start), min(end, stop)
        pieces.append(Piece(int(epoch.order[k]), length, begin - sample_start, until - sample_start, begin - start))
    return pieces


def _padded_pieces(epoch: Epoch, shape: RowShape, number: int) -> list[Piece]:
    """One sample in each sequence."""
    row = slice(number * shape.micro_bsz, (number + 1) * shape.micro_bsz)
    samples = zip(epoch.order[row].tolist(), epoch.lengths[row].tolist(), strict=True)
    return [Piece(sample, length, 0, length, i * shape.seq_len) for i, (sample, length) in enumerate(samples)]


# -- (2) tokens


def _fill(source: SampleSource, pieces: list[Piece], shape: RowShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input ids, labels and type ids of a row, each [P]."""
    input_ids = np.full(shape.packed_length, PAD, np.int64)
    labels = np.full(shape.packed_length, IGNORED, np.int64)
    type_ids = np.zeros(shape.packed_length, np.int64)
    for sample, length, begin, stop, at in pieces:
        tokens = source.read(sample)[:length]
        until = at + stop - begin
        input_ids[at:until] = np.abs(tokens[begin:stop])
        type_ids[at:until] = source.type_ids[sample]
        following = tokens[begin + 1 : stop + 1]  # one fewer at the end of the sample, whose last token has no label
        labels[at : at + len(following)] = np.where(following < 0, IGNORED, following)
    return input_ids, labels, type_ids


# -- (3) cuts


def _sample_cuts(pieces: list[Piece], shape: RowShape) -> list[int]:
    """Cut at every piece, and pieces and pads at seq_len too."""
    filled = sum(piece.stop - piece.begin for piece in pieces)
    bounds = [*(piece.at for piece in pieces), filled, shape.packed_length]
    starts = [start for begin, stop in pairwise(bounds) for start in range(begin, stop, shape.seq_len)]
    return [*starts, shape.packed_length]


def _window_cuts(pieces: list[Piece], shape: RowShape) -> list[int]:
    """Cut at every seq_len, wherever the samples lie."""
    return list(range(0, shape.packed_length + 1, shape.seq_len))


_FindPieces: TypeAlias = Callable[[Epoch, RowShape, int], list[Piece]]
_FindCuts: TypeAlias = Callable[[list[Piece], RowShape], list[int]]

_LAYOUTS: dict[Layout, tuple[_FindPieces, _FindCuts]] = {
    Layout.PACKED: (_stream_pieces, _sample_cuts),
    Layout.WINDOWS: (_stream_pieces, _window_cuts),
    Layout.PADDED: (_padded_pieces, _window_cuts),
}
