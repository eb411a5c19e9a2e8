"""Batch plan: the rows of each training step as a pure function of the step, so that no iterator has state to save.

The rows of an endless sequence are divided into *batches*, counted from 0. Each batch takes the next rows, even if it
is skipped. Step s uses the s-th batch that is not skipped. Each data-parallel rank takes a contiguous range of a batch,
so a step uses the same rows on any number of ranks. All ranks have equally many micro-batches: if the number of ranks
does not divide the rows, the last ranks have rows of padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from internlm.config.schema.fields import Rampup


class Position(NamedTuple):
    """Data position before ``step``: the indices of the next unused batch and of its first row.

    ``state`` is what the rows need to be read on from there at once, by name.
    """

    step: int = 0
    batch: int = 0
    row: int = 0
    state: Mapping[str, list[int]] = MappingProxyType({})


START = Position()


class StepRows(NamedTuple):
    """Rows of a step on all data-parallel ranks together, as the log records them."""

    batch: int
    first_row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Mapping from steps to batches, and from batches to rows.

    ``origin`` is the data position at which this plan begins. A run that resumes from a saved position continues with
    the next row, even if the batch size or the skipped batches have changed since it was saved.
    """

    step_rows: int  # rows per step on all data-parallel ranks together, after the ramp-up
    data_size: int  # data-parallel ranks
    round_size: int = 1  # number that the micro-batches of each rank are a multiple of
    rampup: Rampup | None = None  # in rows
    skip: tuple[tuple[int, int], ...] = ()  # inclusive ranges of batches, ascending and disjoint
    origin: Position = START

    @property
    def micro_num(self) -> int:
        """Number of micro-batches per step on each data-parallel rank, after the ramp-up."""
        return self._micro_batches(self.step_rows)

    def micro_batches(self, step: int) -> int:
        """Return the number of micro-batches of ``step`` on each data-parallel rank."""
        return self._micro_batches(self._size(self._batch(step)))

    def rows(self, step: int, data_rank: int) -> range:
        """Return the indices of the rows that data-parallel rank ``data_rank`` reads in ``step``.

        Ranks may have fewer rows than :meth:`micro_batches`, or none.
        """
        batch = self._batch(step)
        size, first = self._size(batch), self._first_row(batch)
        # The first ranks are full, so row i of the batch is micro-batch i of all ranks together: dropout counts so.
        micro_batches = self._micro_batches(size)
        begin, end = (min(rank * micro_batches, size) for rank in (data_rank, data_rank + 1))
        return range(first + begin, first + end)

    def rows_of_step(self, step: int) -> StepRows:
        """Return the batch and the rows of ``step`` on all data-parallel ranks together."""
        batch = self._batch(step)
        return StepRows(batch, self._first_row(batch), self._size(batch))

    def without_padding_rows(self, step: int, tokens: int) -> int:
        """Return how many of the ``tokens`` of all ranks' micro-batches in ``step`` are in rows of the batch."""
        return tokens * self._size(self._batch(step)) // (self.micro_batches(step) * self.data_size)

    def at(self, step: int, rows: StepRows) -> BatchPlan:
        """Return a plan in which ``step`` has ``rows``, whatever the rows of other steps are."""
        origin = Position(step, rows.batch, rows.first_row)
        return replace(self, step_rows=rows.rows, rampup=None, skip=(), origin=origin)

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

    def _micro_batches(self, rows: int) -> int:
        # Rounded up: what does not fill a round of all ranks is padding.
        return self.round_size * -(-rows // (self.data_size * self.round_size))

    def _first_row(self, batch: int) -> int:
        return self.origin.row + self._size_before(batch) - self._size_before(self.origin.batch)

    def _size(self, batch: int) -> int:
        """Return the number of rows of ``batch``."""
        if self.rampup is None:
            return self.step_rows
        start, increment, every = self.rampup
        return min(self.step_rows, start + increment * (batch // every))

    def _size_before(self, batch: int) -> int:
        """Return the total number of rows in the batches before ``batch``."""
        # In closed form: with a loop over the batches, each lookup would take time proportional to the step.
        if self.rampup is None:
            return self.step_rows * batch
        start, increment, every = self.rampup
        stages = max(0, -(-(self.step_rows - start) // increment))  # of the ramp-up, with `every` batches each
        stage = min(batch // every, stages)
        ramp = every * (start * stage + increment * stage * (stage - 1) // 2)
        return ramp + (batch - every * stage) * self._size(batch)
