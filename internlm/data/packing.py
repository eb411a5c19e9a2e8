"""Packing of samples into rows, as pure functions of the sample lengths, their order and the row index.

A row is made in three steps: (1) find the sample spans that it contains, (2) fill in tokens, types and labels, (3) find
the sequence boundaries, which attention does not cross and which determine ``cu_seqlens`` and the positions. Layouts
differ only in (1) and (3).

Shapes: P = packed_length = seq_len · micro_bsz, C sequence boundaries in a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from internlm.data.array_pool import ArrayPool
from internlm.data.order import Piece, SampleOrder
from internlm.data.provenance import TracedSpan, origin_of
from internlm.data.sources import SampleReader, SampleSource, input_ids

IGNORED = -100  # label of a token without a loss; the ignore_index of torch.nn.functional.cross_entropy
PAD = 0  # input id of padding


class PackingLayout(str, Enum):
    """Layout of samples in a row."""

    PACKED = "packed"  # one token stream; a sequence is a sample, split every seq_len tokens
    WINDOWS = "windows"  # one token stream; a sequence is a window of seq_len tokens, which may span samples
    BEST_FIT = "best_fit"  # whole samples and, of those over seq_len, pieces of seq_len tokens; then padding
    PADDED = "padded"  # micro_bsz samples, each truncated or padded to seq_len


@dataclass(frozen=True)
class RowShape:
    """Sizes and packing layout of a row."""

    seq_len: int  # maximum tokens of a sequence
    micro_bsz: int  # packed_length / seq_len; in the padded layout, the number of sequences
    layout: PackingLayout

    @property
    def packed_length(self) -> int:
        """Number of tokens in a row, padding included."""
        return self.seq_len * self.micro_bsz

    @property
    def longest_sample(self) -> int | None:
        """Number of tokens after which samples are truncated; None: samples are used whole."""
        return self.seq_len if self.layout is PackingLayout.PADDED else None


class SampleSpan(NamedTuple):
    """Piece of a sample in a row, placed at offset ``at`` of the row."""

    piece: Piece
    at: int


class Row(NamedTuple):
    """Row of P tokens, the input of one micro-batch."""

    input_ids: np.ndarray  # [P] int64
    labels: np.ndarray  # [P] int64, the next token or IGNORED
    indexes: np.ndarray  # [P] int64, position within the sequence
    type_ids: np.ndarray  # [P] int64, dataset type
    cu_seqlens: np.ndarray  # [C] int32, sequence boundaries: 0, ..., P


_arrays = ArrayPool()


def make_row(source: SampleSource, order: SampleOrder, shape: RowShape, index: int) -> Row:
    """Create row ``index`` of an order; rows beyond the last one are all padding."""
    find_spans, _ = _LAYOUTS[shape.layout]
    return fill_row(source, find_spans(order, shape, index), shape)


def fill_row(source: SampleReader, spans: list[SampleSpan], shape: RowShape) -> Row:
    """Create the row that consists of sample spans, which are in the order of their offsets."""
    _, find_boundaries = _LAYOUTS[shape.layout]
    row = _padding(shape, find_boundaries(spans, shape))
    _fill(row, source, spans)
    return row


def padding_row(shape: RowShape) -> Row:
    """Create a row without samples, in which every label is ignored."""
    return _padding(shape, _window_boundaries([], shape))


def trace_row(source: SampleSource, order: SampleOrder, shape: RowShape, index: int) -> list[TracedSpan]:
    """Return the pieces of row ``index`` of an order, with the files that they are from."""
    find_spans, _ = _LAYOUTS[shape.layout]
    return [
        TracedSpan(at, begin, stop, length, source.types[source.type_ids[sample]], origin_of(source, sample))
        for (sample, length, begin, stop), at in find_spans(order, shape, index)
    ]


# -- (1) spans


def _stream_spans(order: SampleOrder, shape: RowShape, index: int) -> list[SampleSpan]:
    """Find the sample spans of a row in the packed and windows layouts, where a row is a range of one token stream."""
    start = index * shape.packed_length
    return _side_by_side(order.between(start, start + shape.packed_length))


def _bin_spans(order: SampleOrder, shape: RowShape, index: int) -> list[SampleSpan]:
    """Find the sample spans of a row in the best-fit layout, whose order is one of rows."""
    return _side_by_side(order.samples(index, index + 1))


def _side_by_side(pieces: Iterable[Piece]) -> list[SampleSpan]:
    at, spans = 0, []
    for piece in pieces:
        spans.append(SampleSpan(piece, at))
        at += piece.stop - piece.begin
    return spans


def _padded_spans(order: SampleOrder, shape: RowShape, index: int) -> list[SampleSpan]:
    """Find the sample spans of a row in the padded layout, where each sequence contains one sample."""
    pieces = order.samples(index * shape.micro_bsz, (index + 1) * shape.micro_bsz)
    return [SampleSpan(piece, number * shape.seq_len) for number, piece in enumerate(pieces)]


# -- (2) tokens


def _padding(shape: RowShape, boundaries: list[int]) -> Row:
    """Return a row with these sequence boundaries, in which all is padding."""
    length = shape.packed_length
    input_ids, labels, indexes, type_ids = _arrays.take(4, length)
    input_ids.fill(PAD)
    labels.fill(IGNORED)
    type_ids.fill(0)
    positions = _positions(length)
    for begin, stop in pairwise(boundaries):
        indexes[begin:stop] = positions[: stop - begin]
    return Row(input_ids, labels, indexes, type_ids, np.asarray(boundaries, np.int32))


@functools.lru_cache(8)
def _positions(length: int) -> np.ndarray:
    positions = np.arange(length)
    positions.setflags(write=False)
    return positions


def _fill(row: Row, source: SampleReader, spans: list[SampleSpan]) -> None:
    """Fill the tokens of ``spans`` into ``row``: input ids, labels and type ids."""
    # A row of short samples has many spans, and each call of NumPy takes about as long as copying a thousand tokens:
    # only copies are made by span, all else for the whole row.
    ids, labels = row.input_ids, row.labels
    has_inputs_only = False
    for (sample, length, begin, stop), at in spans:
        tokens = source.read(sample, begin, min(stop + 1, length))
        count = stop - begin
        ids[at : at + count] = tokens[:count]
        # Labels are shifted here rather than in the model, so that a sample split over two rows loses no label. Only
        # the last token of a sample has none: there are no more tokens than the span has.
        if len(tokens) > 1:
            labels[at : at + len(tokens) - 1] = tokens[1:]
            has_inputs_only = has_inputs_only or bool(tokens[-1] < 0)
        if type_id := source.type_ids[sample]:
            row.type_ids[at : at + count] = type_id
    if has_inputs_only or ids.min() < 0:
        labels[labels < 0] = IGNORED
        ids[:] = input_ids(ids)


# -- (3) sequence boundaries


def _sample_boundaries(spans: list[SampleSpan], shape: RowShape) -> list[int]:
    """Return sequence boundaries at the start of every span, and every ``seq_len`` tokens within spans and padding."""
    filled = sum(span.piece.stop - span.piece.begin for span in spans)
    bounds = [*(span.at for span in spans), filled, shape.packed_length]
    starts = [start for begin, stop in pairwise(bounds) for start in range(begin, stop, shape.seq_len)]
    return [*starts, shape.packed_length]


def _window_boundaries(spans: list[SampleSpan], shape: RowShape) -> list[int]:
    """Return sequence boundaries every ``seq_len`` tokens, regardless of where samples begin."""
    return list(range(0, shape.packed_length + 1, shape.seq_len))


_FindSpans: TypeAlias = Callable[[SampleOrder, RowShape, int], list[SampleSpan]]
_FindBoundaries: TypeAlias = Callable[[list[SampleSpan], RowShape], list[int]]

_LAYOUTS: dict[PackingLayout, tuple[_FindSpans, _FindBoundaries]] = {
    PackingLayout.PACKED: (_stream_spans, _sample_boundaries),
    PackingLayout.WINDOWS: (_stream_spans, _window_boundaries),
    PackingLayout.BEST_FIT: (_bin_spans, _sample_boundaries),
    PackingLayout.PADDED: (_padded_spans, _window_boundaries),
}
