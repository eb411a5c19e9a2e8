"""Exchange of small objects between all ranks through host memory: plans, checksums, names and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem

T = TypeVar("T")


class Exchange:
    """Collectives of objects over a gloo group of all ranks, which call the methods in the same order.

    NCCL would send objects through the device, and its groups are busy with training.
    """

    def __init__(self) -> None:
        self.timeout = timedelta(seconds=1800)
        """Timeout of the group, if it is not the default group; set it before the first use."""
        self._own: dist.ProcessGroup | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group; None: the default group, if its backend is gloo. The first use is collective."""
        if self._own is None and dist.get_backend() != "gloo":
            self.separate()
        return self._own

    def separate(self) -> None:
        """Use a group of its own from now on, while training uses the default group in another thread; collective."""
        if self._own is None:
            self._own = dist.new_group(backend="gloo", timeout=self.timeout)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and an empty list on the others."""
        is_first = dist.get_rank() == 0
        values: list[Any] = [None] * dist.get_world_size() if is_first else []
        dist.gather_object(value, values if is_first else None, dst=0, group=self.group)
        return values

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def scatter(self, values: Sequence[T]) -> T:
        """Return the value with the index of this rank of rank 0's ``values``, which other ranks leave empty."""
        own: list[Any] = [None]
        dist.scatter_object_list(own, list(values) or None, src=0, group=self.group)
        value: T = own[0]
        return value

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Gather the checkpoint problems that the ``with`` block raises on any rank, and raise them on all ranks.

        Otherwise ranks without a problem would block in the next collective until it times out. If all errors are
        :class:`DamagedCheckpointError`, so is the error raised.
        """
        found: CheckpointError | None = None
        try:
            yield
        except CheckpointError as error:
            found = error
        own: tuple[tuple[Problem, ...], bool] = ((), True)
        if found:
            own = (found.problems, isinstance(found, DamagedCheckpointError))
        gathered = self.all_gather(own)
        if problems := dict.fromkeys(problem for of_rank, _ in gathered for problem in of_rank):
            kind = DamagedCheckpointError if all(is_damage for _, is_damage in gathered) else CheckpointError
            raise kind(*problems)
