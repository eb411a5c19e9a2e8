"""Work done ahead, handed out in order.

Loaders: the batches of a run, as tensors.

M: micro-batches, P: packed_length, B: micro_bsz, S: seq_len, C: cuts of a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.batch_plan import BatchPlan, Position
from internlm.data.packing import Layout, Row, RowShape
from internlm.data.rows import TrainRows, ValidRows

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """``map(work, items)`` by a pool, up to ``ahead`` items early. An error surfaces at its item."""
    remaining = iter(items)
    pending: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(remaining, ahead))
    try:
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()


def read_ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(work, items)`` by that many threads, in order; by the caller where ``workers`` is 0.

    The threads end with the iterator: when it is exhausted, closed or garbage-collected, or when an item fails.
    """
    if not workers:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="internlm-data") as pool:
        yield from in_order(pool, work, items, ahead=workers)


Batch: TypeAlias = tuple[dict[str, Any], torch.Tensor]


def collate(rows: Sequence[Row], shape: RowShape) -> Batch:
    """Rows as ``(batch, labels)``.

    ``batch`` holds input_ids, indexes and type_ids, and labels is like them: [M, P] int64, beside cu_seqlens, M
    tensors [C] int32. In the padded layout they are [M, B, S], without cu_seqlens.
    """
    padded = shape.layout is Layout.PADDED
    size = (len(rows), shape.micro_bsz, shape.seq_len) if padded else (len(rows), shape.packed_length)

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows])).view(size)

    batch: dict[str, Any] = {name: stacked(name) for name in ("input_ids", "indexes", "type_ids")}
    if not padded:
        batch["cu_seqlens"] = [torch.from_numpy(row.cu_seqlens) for row in rows]
    return batch, stacked("labels")


def split_rows(batch: Batch, part: GroupPosition) -> Batch:
    """This rank's tokens of each row, where a row is split along the sequence; ``cu_seqlens`` stays that of whole rows.

    Padded sequences are taken for pieces of one row, [M, B · S].
    """
    if part.size == 1:
        return batch
    fields, labels = batch
    rows = len(labels)
    cuts = fields.get("cu_seqlens")
    if cuts is None:
        _, sequences, length = labels.shape
        cuts = [torch.arange(sequences + 1, dtype=torch.int32) * length] * rows

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(rows, -1).chunk(part.size, 1)[part.rank]

    split = {name: own(fields[name]) for name in ("input_ids", "indexes", "type_ids")}
    return {**split, "cu_seqlens": cuts}, own(labels)


class TrainLoader:
    """The training batches of one data-parallel rank, from a start step to ``total_steps``; of each row the part of the
    sequence that is this rank's.

    Iterating gives the batches of the steps from the start step on (see :func:`collate`), read ahead by
    ``num_worker`` threads that end with the iterator. What a step reads depends on nothing but its number, so
    :meth:`seek` is all that resuming takes; :meth:`resume` goes on from a saved :class:`Position` where the batch
    size or the skipped batches may have changed.
    """

    def __init__(
        self,
        rows: TrainRows,
        plan: BatchPlan,
        data_rank: int,
        total_steps: int,
        num_worker: int,
        part: GroupPosition = ALONE,
    ) -> None:
        self.plan = plan
        self.types = rows.source.types
        self._rows, self._data_rank, self._total_steps, self._num_worker = rows, data_rank, total_steps, num_worker
        self._start, self._part = 0, part

    def seek(self, step: int) -> None:
        """Iterate from ``step`` on."""
        self._start = step

    def resume(self, position: Position) -> None:
        """Iterate from a position on that :meth:`position` gave."""
        self.plan = self.plan.resumed_at(position)
        self._start = position.step

    def position(self, step: int) -> Position:
        """What to save before ``step``, so that another run may go on from there."""
        return self.plan.position(step)

    def fingerprint(self) -> str:
        """Changes where the data set has changed, so that the samples of a step are no longer those they were."""
        return self._rows.source.fingerprint()

    def read(self, step: int) -> Batch:
        """The batch of one step."""
        rows = [self._rows[row] for row in self.plan.rows(step, self._data_rank)]
        return split_rows(collate(rows, self._rows.shape), self._part)

    def __iter__(self) -> Iterator[Batch]:
        return read_ahead(self.read, range(self._start, self._total_steps), self._num_worker)

    def __len__(self) -> int:
        """Steps from the start step to the end of the run."""
        return max(0, self._total_steps - self._start)


class ValidLoader:
    """The validation batches of one data-parallel rank: one pass over the samples of one type, in order.

    Every rank gets the same number of batches of ``micro_num`` rows, at most ``max_batches``; the last ones are
    filled up with rows in which every label is ignored.
    """

    def __init__(
        self,
        rows: ValidRows,
        micro_num: int,
        data_rank: int,
        data_size: int,
        max_batches: int | None,
        num_worker: int,
        part: GroupPosition = ALONE,
    ) -> None:
        self._rows, self._num_worker, self._part = rows, num_worker, part
        self._plan = BatchPlan(micro_num, data_size)
        self._data_rank = data_rank
        whole = -(-len(rows) // (micro_num * data_size))
        self._batches = whole if max_batches is None else min(whole, max_batches)

    def read(self, number: int) -> Batch:
        """One batch."""
        rows = [self._rows[row] for row in self._plan.rows(number, self._data_rank)]
        return split_rows(collate(rows, self._rows.shape), self._part)

    def __iter__(self) -> Iterator[Batch]:
        return read_ahead(self.read, range(self._batches), self._num_worker)

    def __len__(self) -> int:
        return self._batches
