"""The rows of a source, by number: an endless shuffled sequence for training, one pass in order for validation."""

from __future__ import annotations

import functools
import threading

from internlm.data.packing import Row, RowShape, count_rows, make_epoch, make_row
from internlm.data.sources import SampleSource


class TrainRows:
    """Epoch after epoch, each shuffled by (seed, epoch). Row ``n`` is a pure function of (seed, data set, shape, n)."""

    def __init__(self, source: SampleSource, shape: RowShape, seed: int) -> None:
        self.source, self.shape = source, shape
        self.per_epoch = count_rows(source.lengths, shape)
        assert self.per_epoch, "a source for training holds tokens"
        # Two epochs are in use where rows are read ahead across an epoch's edge.
        self._epoch = functools.lru_cache(2)(functools.partial(make_epoch, source.lengths, shape, seed))
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Row:
        """Row ``number``, counted from 0 over all epochs."""
        epoch_number, row = divmod(number, self.per_epoch)
        with self._lock:  # shuffling is costly: one thread does it for all
            epoch = self._epoch(epoch_number)
        return make_row(self.source, epoch, self.shape, row)


class ValidRows:
    """One pass in the order of the source; beyond its end, rows of pads alone."""

    def __init__(self, source: SampleSource, shape: RowShape) -> None:
        self.source, self.shape = source, shape
        self._epoch = make_epoch(source.lengths, shape, seed=None, number=0)
        self._count = count_rows(source.lengths, shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Row:
        return make_row(self.source, self._epoch, self.shape, number)
