"""Batch plan: the rows of each training step as a pure function of the step, so that no iterator has state to save.

The rows of an endless sequence are divided into *batches*, counted from 0. Each batch takes ``micro_batches ·
data_size`` rows, even if it is skipped. Step s uses the s-th batch that is not skipped. Each data-parallel rank takes a
contiguous range of a batch, so a step uses the same rows on any number of ranks, provided that the global batch size
is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from internlm.config.schema.fields import Rampup


class Position(NamedTuple):
    """Data position before ``step``: the indices of the next unused batch and of its first row."""

    step: int = 0
    batch: int = 0
    row: int = 0


START = Position()


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Mapping from steps to batches, and from batches to rows.

    ``origin`` is the data position at which this plan begins. A run that resumes from a saved position continues with
    the next row, even if the batch size or the skipped batches have changed since it was saved.
    """

    micro_num: int  # micro-batches per step on each data-parallel rank, after the ramp-up
    data_size: int  # data-parallel ranks
    rampup: Rampup | None = None
    skip: tuple[tuple[int, int], ...] = ()  # inclusive ranges of batches, ascending and disjoint
    origin: Position = START

    def micro_batches(self, step: int) -> int:
        """Return the number of micro-batches of ``step`` on each data-parallel rank."""
        return self._size(self._batch(step))

    def rows(self, step: int, data_rank: int) -> range:
        """Return the indices of the rows that data-parallel rank ``data_rank`` reads in ``step``."""
        batch = self._batch(step)
        size = self._size(batch)
        first = self._first_row(batch) + data_rank * size
        return range(first, first + size)

    def position(self, step: int) -> Position:
        """Return the data position before ``step``: the end of the last batch that an earlier step used."""
        if step == self.origin.step:
            return self.origin
        # Counted from the last batch that was used, not from the next one to use: the batches skipped in between may no
        # longer be skipped when the run resumes.
        batch = self._batch(step - 1) + 1
        return Position(step, batch, self._first_row(batch))

    def resumed_at(self, position: Position) -> BatchPlan:
        """Return a copy of this plan whose origin is the saved ``position``."""
        return replace(self, origin=position)

    def _batch(self, step: int) -> int:
        """Return the index of the batch that ``step`` uses."""
        assert step >= self.origin.step, f"step {step} is before the plan's origin {self.origin}"
        batch = self.origin.batch + step - self.origin.step
        for first, last in self.skip:
            first = max(first, self.origin.batch)  # batches before the origin are already consumed
            if first <= batch:
                batch += max(last - first + 1, 0)
        return batch

    def _first_row(self, batch: int) -> int:
        return self.origin.row + self.data_size * (self._size_before(batch) - self._size_before(self.origin.batch))

    def _size(self, batch: int) -> int:
        """Return the number of micro-batches of ``batch`` on each data-parallel rank."""
        if self.rampup is None:
            return self.micro_num
        start, increment, every = self.rampup
        return min(self.micro_num, start + increment * (batch // every))

    def _size_before(self, batch: int) -> int:
        """Return the total number of micro-batches in the batches before ``batch``, on each data-parallel rank."""
        # In closed form: with a loop over the batches, each lookup would take time proportional to the step.
        if self.rampup is None:
            return self.micro_num * batch
        start, increment, every = self.rampup
        stages = max(0, -(-(self.micro_num - start) // increment))  # of the ramp-up, with `every` batches each
        stage = min(batch // every, stages)
        ramp = every * (start * stage + increment * stage * (stage - 1) // 2)
        return ramp + (batch - every * stage) * self._size(batch)
