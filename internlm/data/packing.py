"""Packing of samples into rows, as pure functions of the sample lengths, their order and the row index.

A row is made in three steps: (1) find the sample spans that it contains, (2) fill in tokens, types and labels, (3) find
the sequence boundaries, which attention does not cross and which determine ``cu_seqlens`` and the positions. Layouts
differ only in (1) and (3).

Shapes: N samples in an epoch, P = packed_length = seq_len · micro_bsz, C sequence boundaries in a row.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from internlm.data.sources import Purpose, SampleSource, raw_numbers

IGNORED = -100  # label of a token without a loss; the ignore_index of torch.nn.functional.cross_entropy
PAD = 0  # input id of padding


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


class Epoch(NamedTuple):
    """One epoch (pass over the samples): the order of the samples, and the number of tokens used from each."""

    order: np.ndarray  # [N] sample indices
    lengths: np.ndarray  # [N] tokens used of each sample, in that order
    ends: np.ndarray  # [N] cumulative tokens, including the sample itself


class SampleSpan(NamedTuple):
    """Part of a sample in a row: tokens [``begin``, ``stop``) of the sample, placed at offset ``at`` of the row.

    ``length`` is the number of tokens that the epoch uses from the sample.
    """

    sample: int
    length: int
    begin: int
    stop: int
    at: int


class Row(NamedTuple):
    """Row of P tokens, the input of one micro-batch."""

    input_ids: np.ndarray  # [P] int64
    labels: np.ndarray  # [P] int64, the next token or IGNORED
    indexes: np.ndarray  # [P] int64, position within the sequence
    type_ids: np.ndarray  # [P] int64, dataset type
    cu_seqlens: np.ndarray  # [C] int32, sequence boundaries: 0, ..., P


def make_epoch(lengths: np.ndarray, shape: RowShape, seed: int | None, index: int) -> Epoch:
    """Create epoch ``index``: its samples are shuffled by (seed, index), or in source order if ``seed`` is None."""
    order = np.flatnonzero(lengths)
    if seed is not None:
        # Sorting by raw random numbers, because np.random.shuffle may differ between versions of NumPy.
        order = order[np.argsort(raw_numbers(len(order), seed, Purpose.ORDER, index), kind="stable")]
    used = lengths[order]
    if shape.layout is PackingLayout.PADDED:
        used = np.minimum(used, shape.seq_len)
    return Epoch(order, used, np.cumsum(used))


def count_rows(lengths: np.ndarray, shape: RowShape) -> int:
    """Return the number of rows in an epoch, including the last one, which may be padded."""
    if shape.layout is PackingLayout.PADDED:
        return -(-int(np.count_nonzero(lengths)) // shape.micro_bsz)
    return -(-int(lengths.sum()) // shape.packed_length)


def make_row(source: SampleSource, epoch: Epoch, shape: RowShape, index: int) -> Row:
    """Create row ``index`` of an epoch; rows beyond the last one are all padding."""
    find_spans, find_boundaries = _LAYOUTS[shape.layout]
    spans = find_spans(epoch, shape, index)
    input_ids, labels, type_ids = _fill(source, spans, shape)
    cu_seqlens = np.asarray(find_boundaries(spans, shape), np.int32)
    indexes = np.arange(shape.packed_length) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return Row(input_ids, labels, indexes, type_ids, cu_seqlens)


class TrainRows:
    """Training rows of an unlimited number of epochs, each shuffled; row n is a function of (seed, data, shape, n)."""

    def __init__(self, source: SampleSource, shape: RowShape, seed: int) -> None:
        self.source, self.shape = source, shape
        self.per_epoch = count_rows(source.lengths, shape)
        assert self.per_epoch, "a source for training must contain tokens"
        # Two epochs are in use while rows are read ahead across an epoch boundary.
        self._epoch = functools.lru_cache(2)(functools.partial(make_epoch, source.lengths, shape, seed))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return self.per_epoch

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``, counted from 0 over all epochs."""
        _check_index(index)
        epoch_index, row = divmod(index, self.per_epoch)
        with self._lock:  # lru_cache alone would let every waiting thread shuffle the same epoch
            epoch = self._epoch(epoch_index)
        return make_row(self.source, epoch, self.shape, row)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows of the first epoch; Python's default would stop at an ``IndexError`` only."""
        return map(self.__getitem__, range(len(self)))


class ValidRows:
    """Validation rows of one epoch in source order; rows beyond its end are all padding."""

    def __init__(self, source: SampleSource, shape: RowShape) -> None:
        self.source, self.shape = source, shape
        self._epoch = make_epoch(source.lengths, shape, seed=None, index=0)
        self._count = count_rows(source.lengths, shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        _check_index(index)
        return make_row(self.source, self._epoch, self.shape, index)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))


def _check_index(index: int) -> None:
    if index < 0:
        raise IndexError(f"rows are counted from 0, got index {index}")


# -- (1) spans


def _stream_spans(epoch: Epoch, shape: RowShape, index: int) -> list[SampleSpan]:
    """Find the sample spans of a row in the packed and windows layouts, where a row is a range of one token stream."""
    start = index * shape.packed_length
    stop = min(start + shape.packed_length, int(epoch.ends[-1]))
    if start >= stop:
        return []
    first, last = np.searchsorted(epoch.ends, (start + 1, stop))
    spans = []
    for k in range(first, last + 1):
        length, end = int(epoch.lengths[k]), int(epoch.ends[k])
        sample_start = end - length
        begin, until = max(start, sample_start), min(end, stop)
        spans.append(SampleSpan(int(epoch.order[k]), length, begin - sample_start, until - sample_start, begin - start))
    return spans


def _padded_spans(epoch: Epoch, shape: RowShape, index: int) -> list[SampleSpan]:
    """Find the sample spans of a row in the padded layout, where each sequence contains one sample."""
    row = slice(index * shape.micro_bsz, (index + 1) * shape.micro_bsz)
    samples = zip(epoch.order[row].tolist(), epoch.lengths[row].tolist(), strict=True)
    return [SampleSpan(sample, length, 0, length, i * shape.seq_len) for i, (sample, length) in enumerate(samples)]


# -- (2) tokens


def _fill(source: SampleSource, spans: list[SampleSpan], shape: RowShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the input ids, labels and type ids of a row, each [P]."""
    input_ids = np.full(shape.packed_length, PAD, np.int64)
    labels = np.full(shape.packed_length, IGNORED, np.int64)
    type_ids = np.zeros(shape.packed_length, np.int64)
    for sample, length, begin, stop, at in spans:
        tokens = source.read(sample)[:length]
        until = at + stop - begin
        input_ids[at:until] = np.abs(tokens[begin:stop])
        type_ids[at:until] = source.type_ids[sample]
        # Labels are shifted here rather than in the model, so that a sample split over two rows loses no label. Only
        # the last token of a sample has none: there `following` is one shorter than the span.
        following = tokens[begin + 1 : stop + 1]
        labels[at : at + len(following)] = np.where(following < 0, IGNORED, following)
    return input_ids, labels, type_ids


# -- (3) sequence boundaries


def _sample_boundaries(spans: list[SampleSpan], shape: RowShape) -> list[int]:
    """Return sequence boundaries at the start of every span, and every ``seq_len`` tokens within spans and padding."""
    filled = sum(span.stop - span.begin for span in spans)
    bounds = [*(span.at for span in spans), filled, shape.packed_length]
    starts = [start for begin, stop in pairwise(bounds) for start in range(begin, stop, shape.seq_len)]
    return [*starts, shape.packed_length]


def _window_boundaries(spans: list[SampleSpan], shape: RowShape) -> list[int]:
    """Return sequence boundaries every ``seq_len`` tokens, regardless of where samples begin."""
    return list(range(0, shape.packed_length + 1, shape.seq_len))


_FindSpans: TypeAlias = Callable[[Epoch, RowShape, int], list[SampleSpan]]
_FindBoundaries: TypeAlias = Callable[[list[SampleSpan], RowShape], list[int]]

_LAYOUTS: dict[PackingLayout, tuple[_FindSpans, _FindBoundaries]] = {
    PackingLayout.PACKED: (_stream_spans, _sample_boundaries),
    PackingLayout.WINDOWS: (_stream_spans, _window_boundaries),
    PackingLayout.PADDED: (_padded_spans, _window_boundaries),
}
