"""Data loaders: the batches of a run as tensors, prefetched by threads.

Shapes: M micro-batches, P = packed_length, B = micro_bsz, S = seq_len, C sequence boundaries in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Protocol, TypeAlias

import torch

from internlm.accelerator import device_kind
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.array_pool import ArrayPool
from internlm.data.batch_plan import BatchPlan, Position
from internlm.data.packing import PackingLayout, Row, RowShape, padding_row
from internlm.data.read_ahead import read_ahead
from internlm.data.rows import TrainingRows
from internlm.data.sources import ListsFiles
from internlm.utils.compat import ReplacedNames
from internlm.utils.errors import Problem, UserError

Batch: TypeAlias = tuple[dict[str, Any], torch.Tensor]

#: For the batches that threads of several loaders have read ahead; four arrays are one batch.
_batches = ArrayPool(most=64)


# -- rows to tensors


def collate(rows: Iterable[Row], shape: RowShape, count: int) -> Batch:
    """Copy ``count`` rows into tensors ``(batch, labels)``, one row per micro-batch.

    Returns:
        ``batch`` with ``input_ids``, ``indexes`` and ``type_ids``, each int64 [M, P], and ``cu_seqlens``, a list of M
        int32 tensors [C]; and ``labels``, int64 [M, P]. In the padded layout the tensors are [M, B, S], and
        there is no ``cu_seqlens``.
    """
    names = ("input_ids", "indexes", "type_ids", "labels")
    arrays = {name: _batches.take(count, shape.packed_length) for name in names}
    cu_seqlens = []
    for place, row in zip(range(count), rows, strict=True):
        for name, array in arrays.items():
            array[place] = getattr(row, name)
        cu_seqlens.append(torch.from_numpy(row.cu_seqlens))
    padded = shape.layout is PackingLayout.PADDED
    size = (count, shape.micro_bsz, shape.seq_len) if padded else (count, shape.packed_length)
    batch: dict[str, Any] = {name: torch.from_numpy(array).view(size) for name, array in arrays.items()}
    labels = batch.pop("labels")
    if not padded:
        batch["cu_seqlens"] = cu_seqlens
    return batch, labels


def split_rows(batch: Batch, sequence_shard: GroupPosition) -> Batch:
    """Split the rows of a batch along the sequence, and return this rank's shard.

    Attention needs the boundaries of whole rows, so ``cu_seqlens`` is not split. Padded sequences are first joined into
    packed rows of P = B · S tokens.

    Returns:
        ``(batch, labels)`` as returned by :func:`collate`, but with tensors [M, P / number of shards].
    """
    if sequence_shard.size == 1:
        return batch
    fields, labels = batch
    rows = len(labels)
    cu_seqlens = fields.get("cu_seqlens")
    if cu_seqlens is None:
        _, sequences, length = labels.shape
        cu_seqlens = [torch.arange(sequences + 1, dtype=torch.int32) * length] * rows

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(rows, -1).chunk(sequence_shard.size, 1)[sequence_shard.rank]

    split = {name: local(fields[name]) for name in ("input_ids", "indexes", "type_ids")}
    return {**split, "cu_seqlens": cu_seqlens}, local(labels)


def pin_batch(batch: Batch) -> Batch:
    """Return ``batch`` in pinned memory, from which copies to the device do not block; on the CPU, ``batch`` itself."""
    pin = device_kind().pin
    fields, labels = batch
    pinned = {name: list(map(pin, field)) if isinstance(field, list) else pin(field) for name, field in fields.items()}
    return pinned, pin(labels)


# -- loaders


class AnyRows(Protocol):
    """Protocol for rows by index, for training or validation; rows beyond the end of a validation are all padding."""

    shape: RowShape

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class _RowLoader:
    """Base class of loaders: the batches of a range of steps, prefetched by ``num_worker`` threads.

    ``dataset``, ``collate_fn`` and ``batch_sampler`` are views with the names of ``torch.utils.data.DataLoader``, for
    scripts that read them.
    """

    def __init__(
        self,
        rows: AnyRows,
        plan: BatchPlan,
        data_rank: int,
        num_worker: int,
        sequence_shard: GroupPosition,
    ) -> None:
        self.plan = plan
        self._rows, self._data_rank, self._sequence_shard = rows, data_rank, sequence_shard
        self.num_worker = num_worker

    def steps(self) -> range:
        """Return the steps whose batches iteration yields."""
        raise NotImplementedError

    def read(self, step: int) -> Batch:
        """Read the batch of ``step``."""
        shape, rows = self._rows.shape, self.plan.rows(step, self._data_rank)
        count = self.plan.micro_batches(step)
        missing = [padding_row(shape)] * (count - len(rows)) if count > len(rows) else []
        # One row at a time: the arrays of a row that has been copied are those of the next one.
        batch = collate(chain(map(self._rows.__getitem__, rows), missing), shape, count)
        # Pinning copies: a thread that reads ahead does it during earlier steps.
        return pin_batch(split_rows(batch, self._sequence_shard))

    def __iter__(self) -> Iterator[Batch]:
        return read_ahead(self.read, self.steps(), self.num_worker)

    def __len__(self) -> int:
        """Return the number of batches that iteration yields."""
        return len(self.steps())

    @property
    def dataset(self) -> Any:
        """Packed rows by index; its length is the number of rows in an epoch."""
        return self._rows

    @property
    def collate_fn(self) -> Callable[[Sequence[Row]], Batch]:
        """Function that makes the batch of this rank from rows."""
        return lambda rows: split_rows(collate(rows, self._rows.shape, len(rows)), self._sequence_shard)

    @property
    def batch_sampler(self) -> BatchSampler:
        """Indices of the rows of each batch."""
        return BatchSampler(self.plan, self._data_rank, self.steps())


class BatchSampler(ReplacedNames):
    """Read-only view of the rows that a loader reads: iterating yields the row indices of each batch.

    Args:
        plan: Plan of the loader.
        data_rank: Data-parallel rank whose rows are listed.
        steps: Steps of the batches.
    """

    replaced: ClassVar[Mapping[str, str]] = {
        "state_dict": "Use train_dl.position(step), which a checkpoint saves",
        "load_state_dict": "Use train_dl.resume(position), or train_dl.seek(step)",
    }

    def __init__(self, plan: BatchPlan, data_rank: int, steps: range) -> None:
        self._plan, self._data_rank, self._steps = plan, data_rank, steps

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            todo = "Remove the line: train_dl.seek(step) sets the step at which iteration begins"
            raise UserError(Problem(f"batch_sampler.{name}", f"cannot be set to {value!r}, a view is read-only", todo))
        super().__setattr__(name, value)

    @property
    def batch_size(self) -> int:
        """Number of rows of a batch, which are its micro-batches, after the batch-size ramp-up."""
        return self._plan.micro_num

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self._plan.rows(step, self._data_rank)) for step in self._steps)

    def __len__(self) -> int:
        return len(self._steps)


class TrainLoader(_RowLoader):
    """Loader of the training batches of one data-parallel rank, from a start step to ``total_steps``.

    Iterating yields the batch of each step (see :func:`collate` and :func:`split_rows`), prefetched by ``num_worker``
    threads. A batch depends only on its step, so :meth:`seek` suffices to restart at a step. :meth:`resume` continues
    from a saved :class:`Position` even if the batch size or the skipped batches have changed since.

    Raises:
        UserError: An iterator is read on after :meth:`resume`.
    """

    def __init__(
        self,
        rows: TrainingRows,
        plan: BatchPlan,
        data_rank: int,
        total_steps: int,
        num_worker: int,
        sequence_shard: GroupPosition = ALONE,
    ) -> None:
        super().__init__(rows, plan, data_rank, num_worker, sequence_shard)
        self.rows, self.types, self.fingerprint = rows, rows.types, rows.fingerprint
        self.state_is_sharded = rows.state_is_sharded
        rows.follow(plan)
        self._total_steps, self._start = total_steps, 0

    def files(self) -> str:
        """Return the list of the files for checkpoints; empty for rows without one."""
        return self.rows.files() if isinstance(self.rows, ListsFiles) else ""

    def seek(self, step: int) -> None:
        """Set the step at which iteration begins."""
        self._start = step

    def resume(self, position: Position, has_changed: bool = False) -> None:
        """Start iteration at a data position that :meth:`position` returned, possibly in an earlier run.

        Args:
            position: The data position.
            has_changed: Whether the data, or settings that determine the rows, have changed since it was saved.
        """
        self.rows.resume(position.row, position.state, has_changed)
        self.plan = self.plan.resumed_at(position)
        # After the state: the plan says where mixtures change from here on.
        self.rows.follow(self.plan)
        self._start = position.step

    def __iter__(self) -> Iterator[Batch]:
        return self._until_resumed(self.plan, super().__iter__())

    def _until_resumed(self, plan: BatchPlan, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield ``batches``, which begin at a step of ``plan``; raise when the loader has another plan."""
        while self.plan is plan:  # checked before reading: the other plan may not have the step
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
        message = "the run was resumed after this iterator was made, whose batches are those of other steps"
        todo = "Resume before iter(train_dl): call ckpt_manager.try_resume_training(trainer.state) first"
        raise UserError(Problem("train_dl", message, todo))

    def position(self, step: int) -> Position:
        """Return the data position before ``step``, to be saved in a checkpoint."""
        position = self.plan.position(step)
        return position._replace(state=self.rows.state(position.row))

    def steps(self) -> range:
        """Return the steps from the start step to the end of the run."""
        return range(self._start, self._total_steps)


class ValidLoader(_RowLoader):
    """Loader of the validation batches of one data-parallel rank: one pass over its rows, in order.

    Every rank gets the same number of batches, at most ``max_batches``, because evaluation is collective. If the
    rows run out, the last batches are completed with padding rows, in which every label is ignored.
    """

    def __init__(
        self,
        rows: AnyRows,
        plan: BatchPlan,
        data_rank: int,
        max_batches: int | None,
        num_worker: int,
        sequence_shard: GroupPosition = ALONE,
    ) -> None:
        super().__init__(rows, plan, data_rank, num_worker, sequence_shard)
        batches = -(-len(rows) // plan.step_rows)
        self._batches = batches if max_batches is None else min(batches, max_batches)

    @property
    def rows_used(self) -> int:
        """Number of rows in the batches of all ranks together, without padding rows."""
        return min(len(self._rows), self._batches * self.plan.step_rows)

    def with_rows(self, rows: AnyRows) -> ValidLoader:
        """Return a loader of all of ``rows``, with the settings of this one."""
        return ValidLoader(rows, self.plan, self._data_rank, None, self.num_worker, self._sequence_shard)

    def steps(self) -> range:
        """Return the indices of the batches."""
        return range(self._batches)
