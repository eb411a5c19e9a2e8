"""Packing of samples into rows, as pure functions of the sample lengths, their order and the row index.

A row is made in three steps: (1) find the sample spans that it contains, (2) fill in tokens, types and labels, (3) find
the sequence boundaries, which attention does not cross and which determine ``cu_seqlens`` and the positions. Layouts
differ only in (1) and (3).

Shapes: P = packed_length = seq_len · micro_bsz, C sequence boundaries in a row.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from internlm.data.fingerprint import ORDER
from internlm.data.order import EpochOrder, Piece, SampleOrder, shuffled
from internlm.data.provenance import TracedSpan, origin_of
from internlm.data.sources import ListsFiles, SampleReader, SampleSource, input_ids

IGNORED = -100  # label of a token without a loss; the ignore_index of torch.nn.functional.cross_entropy
PAD = 0  # input id of padding


ORDER_VERSION = 2  # part of the fingerprint: a run must not continue in another order


class PackingLayout(str, Enum):
    """Layout of samples in a row."""

    PACKED = "packed"  # one token stream; a sequence is a sample, split every seq_len tokens
    WINDOWS = "windows"  # one token stream; a sequence is a window of seq_len tokens, which may span samples
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


def count_rows(lengths: np.ndarray, shape: RowShape) -> int:
    """Return the number of rows in an epoch, including the last one, which may be padded."""
    if shape.layout is PackingLayout.PADDED:
        return -(-len(lengths) // shape.micro_bsz)
    return -(-int(lengths.sum()) // shape.packed_length)


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


class TrainingRows(Protocol):
    """Protocol for the endless sequence of rows that a run trains on; row n is the same on all ranks and restarts."""

    shape: RowShape
    types: list[str]  # names of the dataset types
    state_is_sharded: bool  # whether ranks have different parts of the state

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``, counted from 0 over all epochs."""

    def fingerprint(self) -> str:
        """Return a digest that changes when the rows change, apart from settings that a checkpoint has by name."""

    def state(self, row: int) -> dict[str, list[int]]:
        """Return what a later run needs, besides the index, to read on from ``row`` at once.

        A checkpoint has the entries of all ranks if ``state_is_sharded``, and those of rank 0 otherwise.
        """

    def resume(self, row: int, state: Mapping[str, list[int]]) -> None:
        """Read on from ``row``, with the :meth:`state` of all ranks there."""


class TrainRows:
    """Training rows of an unlimited number of epochs, each shuffled; row n is a function of (seed, data, shape, n)."""

    state_is_sharded = False

    def __init__(self, source: SampleSource, shape: RowShape, seed: int) -> None:
        self.source, self.shape = source, shape
        self.types = source.types
        self.per_epoch = count_rows(source.lengths, shape)
        assert self.per_epoch, "a source for training must contain tokens"
        # Two epochs are in use while rows are read ahead across an epoch boundary.
        self._epoch = functools.lru_cache(2)(functools.partial(shuffled, source.lengths, shape.longest_sample, seed))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return self.per_epoch

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``, counted from 0 over all epochs."""
        _check_index(index)
        epoch_index, row = divmod(index, self.per_epoch)
        with self._lock:  # lru_cache alone would let every waiting thread prepare the same epoch
            epoch = self._epoch(epoch_index)
        return make_row(self.source, epoch, self.shape, row)

    def trace(self, index: int) -> list[TracedSpan]:
        """Return the pieces of row ``index``, counted from 0 over all epochs, with the files that they are from."""
        epoch_index, row = divmod(index, self.per_epoch)
        find_spans, _ = _LAYOUTS[self.shape.layout]
        return [
            TracedSpan(
                at, begin, stop, length, self.types[self.source.type_ids[sample]], origin_of(self.source, sample)
            )
            for (sample, length, begin, stop), at in find_spans(self._epoch(epoch_index), self.shape, row)
        ]

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows of the first epoch; Python's default would stop at an ``IndexError`` only."""
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> str:
        """Return a digest that changes when the rows change, apart from settings that a checkpoint has by name."""
        return f"{ORDER}:{ORDER_VERSION} {self.source.fingerprint()}"

    def files(self) -> str:
        """Return the list of the files for checkpoints; empty for data without files."""
        return self.source.files() if isinstance(self.source, ListsFiles) else ""

    def state(self, row: int) -> dict[str, list[int]]:
        """Return nothing: a row is found from its index."""
        return {}

    def resume(self, row: int, state: Mapping[str, list[int]]) -> None:
        """Do nothing."""


class ValidRows:
    """Validation rows of one epoch in source order; rows beyond its end are all padding."""

    def __init__(self, source: SampleSource, shape: RowShape) -> None:
        self.source, self.shape = source, shape
        self._order = EpochOrder(source.lengths, shape.longest_sample, permutation=None)
        self._count = count_rows(source.lengths, shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        _check_index(index)
        return make_row(self.source, self._order, self.shape, index)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))


def _check_index(index: int) -> None:
    if index < 0:
        raise IndexError(f"rows are counted from 0, got index {index}")


# -- (1) spans


def _stream_spans(order: SampleOrder, shape: RowShape, index: int) -> list[SampleSpan]:
    """Find the sample spans of a row in the packed and windows layouts, where a row is a range of one token stream."""
    start, at, spans = index * shape.packed_length, 0, []
    for piece in order.between(start, start + shape.packed_length):
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
    cu_seqlens = np.asarray(boundaries, np.int32)
    return Row(
        input_ids=np.full(shape.packed_length, PAD, np.int64),
        labels=np.full(shape.packed_length, IGNORED, np.int64),
        indexes=np.arange(shape.packed_length) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)),
        type_ids=np.zeros(shape.packed_length, np.int64),
        cu_seqlens=cu_seqlens,
    )


def _fill(row: Row, source: SampleReader, spans: list[SampleSpan]) -> None:
    """Fill the tokens of ``spans`` into ``row``: input ids, labels and type ids."""
    for (sample, length, begin, stop), at in spans:
        tokens = source.read(sample, begin, min(stop + 1, length))
        until = at + stop - begin
        row.input_ids[at:until] = input_ids(tokens[: stop - begin])
        row.type_ids[at:until] = source.type_ids[sample]
        # Labels are shifted here rather than in the model, so that a sample split over two rows loses no label. Only
        # the last token of a sample has none: there `following` is one shorter than the span.
        following = tokens[1:]
        row.labels[at : at + len(following)] = np.where(following < 0, IGNORED, following)


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
    PackingLayout.PADDED: (_padded_spans, _window_boundaries),
}
