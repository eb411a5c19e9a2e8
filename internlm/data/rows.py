"""Rows of a run: those that it trains on, an endless sequence, and those that it is validated on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from internlm.data.batch_plan import BatchPlan
from internlm.data.best_fit import BinOrder, Bins
from internlm.data.bins_cache import pack_source
from internlm.data.fingerprint import ORDER
from internlm.data.order import EpochOrder, SampleOrder, shuffled
from internlm.data.packing import PackingLayout, Row, RowShape, make_row, trace_row
from internlm.data.provenance import TracedSpan
from internlm.data.sources import ListsFiles, SampleSource

SAMPLES_LOOKED_AT = 1 << 16
ORDER_VERSION = 2  # part of the fingerprint: a run must not continue in another order


class Items(NamedTuple):
    """Items that an order shuffles: samples, or the rows that best-fit packing has divided them among."""

    lengths: np.ndarray  # tokens of each item
    bins: Bins | None

    def in_order(self, order: SampleOrder) -> SampleOrder:
        """Return the order of samples that follows from an order of the items."""
        return order if self.bins is None else BinOrder(self.bins, order)

    def describe_rows(self, source_lengths: np.ndarray, shape: RowShape) -> str:
        """Describe an epoch for the log: its rows, the share that is padding, and the share of samples that are cut."""
        rows = self.count_rows(shape)
        used = np.minimum(source_lengths, shape.longest_sample) if shape.longest_sample else source_lengths
        padding = 1 - int(used.sum()) / (rows * shape.packed_length)
        if shape.layout in (PackingLayout.PACKED, PackingLayout.WINDOWS):
            # Of the first samples in the order of the source, as if these were the epoch: where rows end is chance.
            some = source_lengths[:SAMPLES_LOOKED_AT]
            ends = np.cumsum(some)
            size = shape.packed_length if shape.layout is PackingLayout.PACKED else shape.seq_len
            cut = ((ends - some) // size != (ends - 1) // size) | (some > shape.seq_len)
        else:
            cut = source_lengths > shape.seq_len
        return f"{rows} rows per epoch, {padding:.2%} padding, {cut.mean():.2%} of the samples cut"

    def count_rows(self, shape: RowShape) -> int:
        """Return the number of rows in an epoch, including the last one, which may be padded."""
        if self.bins is not None:
            return len(self.bins)
        if shape.layout is PackingLayout.PADDED:
            return -(-len(self.lengths) // shape.micro_bsz)
        return -(-int(self.lengths.sum()) // shape.packed_length)


def items_of(source: SampleSource, shape: RowShape, seed: int) -> Items:
    """Return the items of ``source`` in the packing layout of ``shape``."""
    # Best-fit packing is made once, and epochs shuffle its rows: then any row is found without packing those before.
    if shape.layout is not PackingLayout.BEST_FIT:
        return Items(source.lengths, None)
    bins, _ = pack_source(source, shape, seed, {"all": None})
    return Items(bins.tokens, bins)


def check_index(index: int) -> None:
    """Raise an ``IndexError`` if ``index`` is negative, which would count from an end that rows do not have."""
    if index < 0:
        raise IndexError(f"rows are counted from 0, got index {index}")


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

    def resume(self, row: int, state: Mapping[str, list[int]], has_changed: bool = False) -> None:
        """Read on from ``row``, with the :meth:`state` of all ranks there.

        Args:
            row: Index of the next row.
            state: The state there.
            has_changed: Whether the data, or settings that determine the rows, differ from those of the state.
        """

    def follow(self, plan: BatchPlan) -> None:
        """Take the plan that assigns rows to steps, in which a mixture may change."""


class RowsOfSource:
    """Base class of training rows that are made from a source of samples, and found from their index alone."""

    state_is_sharded = False
    source: SampleSource

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``, counted from 0 over all epochs."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows of the first epoch; Python's default would stop at an ``IndexError`` only."""
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> str:
        """Return a digest that changes when the rows change, apart from settings that a checkpoint has by name."""
        return f"{ORDER}:{ORDER_VERSION} {self.source.fingerprint()}"

    def files(self) -> str:
        """Return the list of the files for checkpoints; empty for data without files."""
        return self.source.files() if isinstance(self.source, ListsFiles) else ""


class TrainRows(RowsOfSource):
    """Training rows of an unlimited number of epochs, each shuffled; row n is a function of (seed, data, shape, n)."""

    def __init__(self, source: SampleSource, shape: RowShape, seed: int) -> None:
        self.source, self.shape, self._seed = source, shape, seed
        self.types = source.types
        self._items = items_of(source, shape, seed)
        self.per_epoch = self._items.count_rows(shape)
        assert self.per_epoch, "a source for training must contain tokens"
        #: Rows, padding and cuts of an epoch, for a log.
        self.description = self._items.describe_rows(source.lengths, shape)
        # An epoch takes about 0.1 seconds per million samples, once. Two of them are in use while rows are read ahead
        # across an epoch boundary.
        self._epoch = functools.lru_cache(2)(self._make_epoch)
        self._lock = threading.Lock()

    def _make_epoch(self, index: int) -> SampleOrder:
        lengths, longest = self._items.lengths, self.shape.longest_sample
        order = shuffled(lengths, longest, self._seed, index)
        is_stream = self.shape.layout in (PackingLayout.PACKED, PackingLayout.WINDOWS)
        return self._items.in_order(order.prepare() if is_stream else order)

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return self.per_epoch

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``, counted from 0 over all epochs."""
        check_index(index)
        epoch_index, row = divmod(index, self.per_epoch)
        with self._lock:  # lru_cache alone would let every waiting thread prepare the same epoch
            epoch = self._epoch(epoch_index)
        return make_row(self.source, epoch, self.shape, row)

    def trace(self, index: int) -> list[TracedSpan]:
        """Return the pieces of row ``index``, counted from 0 over all epochs, with the files that they are from."""
        epoch_index, row = divmod(index, self.per_epoch)
        return trace_row(self.source, self._epoch(epoch_index), self.shape, row)

    def state(self, row: int) -> dict[str, list[int]]:
        """Return nothing: a row is found from its index."""
        return {}

    def resume(self, row: int, state: Mapping[str, list[int]], has_changed: bool = False) -> None:
        """Do nothing."""

    def follow(self, plan: BatchPlan) -> None:
        """Do nothing: rows do not depend on their steps."""


class ValidRows:
    """Validation rows of one epoch in source order; rows beyond its end are all padding."""

    def __init__(self, source: SampleSource, shape: RowShape) -> None:
        self.source, self.shape = source, shape
        items = items_of(source, shape, seed=0)
        self._order = items.in_order(EpochOrder(items.lengths, shape.longest_sample, permutation=None))
        self._count = items.count_rows(shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        check_index(index)
        return make_row(self.source, self._order, self.shape, index)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))
