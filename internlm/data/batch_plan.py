"""Which rows each step uses. Pure: no iterator has a state to save.

The rows of an endless sequence are dealt out in *batches*, numbered from 0: batch b takes ``micro_batches ·
data_size`` rows, whether it is used or not. Step s uses the batch that is the s-th of those not skipped. Each
data-parallel rank takes a contiguous share of a batch, so the rows of a step don't depend on how many ranks share
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from internlm.config.schema.fields import Rampup


class Position(NamedTuple):
    """Where a run stands before ``step``: the next batch that may be used, and the global row at which it begins."""

    step: int = 0
    batch: int = 0
    row: int = 0


START = Position()


@dataclass(frozen=True)
class BatchPlan:
    """Steps to batches to rows.

    ``origin`` is where the plan was taken up. A run that resumes from the position it had saved goes on with the very
    next row, even where the size of a batch or the skipped batches have changed in between.
    """

    micro_num: int  # micro-batches per step on each data-parallel rank, once ramped up
    data_size: int  # data-parallel ranks
    rampup: Rampup | None = None
    skip: tuple[tuple[int, int], ...] = ()  # inclusive ranges of batches, in order, apart
    origin: Position = START

    def micro_batches(self, step: int) -> int:
        """Micro-batches of ``step`` on each data-parallel rank."""
        return self._size(self._batch(step))

    def rows(self, step: int, data_rank: int) -> range:
        """Global rows that ``step`` uses on ``data_rank``."""
        batch = self._batch(step)
        size = self._size(batch)
        first = self._first_row(batch) + data_rank * size
        return range(first, first + size)

    def position(self, step: int) -> Position:
        """Where a run stands that has done all steps before ``step``; its rows are those of all batches up to there."""
        if step == self.origin.step:
            return self.origin
        batch = self._batch(step - 1) + 1
        return Position(step, batch, self._first_row(batch))

    def resumed_at(self, position: Position) -> BatchPlan:
        """The same plan, taken up at a position saved earlier."""
        return replace(self, origin=position)

    def _batch(self, step: int) -> int:
        assert step >= self.origin.step, f"step {step} lies before {self.origin}"
        batch = self.origin.batch + step - self.origin.step
        for first, last in self.skip:
            first = max(first, self.origin.batch)
            if first <= batch:
                batch += max(last - first + 1, 0)
        return batch

    def _first_row(self, batch: int) -> int:
        return self.origin.row + self.data_size * (self._size_before(batch) - self._size_before(self.origin.batch))

    def _size(self, batch: int) -> int:
        if self.rampup is None:
            return self.micro_num
        start, increment, every = self.rampup
        return min(self.micro_num, start + increment * (batch // every))

    def _size_before(self, batch: int) -> int:
        """Sum of the sizes of all batches before ``batch``, in closed form."""
        if self.rampup is None:
            return self.micro_num * batch
        start, increment, every = self.rampup
        stages = max(0, -(-(self.micro_num - start) // increment))  # of `every` batches each, smaller than micro_num
        stage = min(batch // every, stages)
        ramp = every * (start * stage + increment * stage * (stage - 1) // 2)
        return ramp + (batch - every * stage) * self._size(batch)
