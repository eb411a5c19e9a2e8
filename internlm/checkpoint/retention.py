"""Retention: which checkpoints a run deletes after it has committed a new one."""

from __future__ import annotations

from collections.abc import Collection


def to_delete(steps: Collection[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Return the steps of the checkpoints to delete, oldest first.

    Args:
        steps: Steps of all committed checkpoints.
        keep_last: Number of the newest checkpoints to keep, at least 1.
        keep_every: Also keep the checkpoints whose step is a multiple of this number; None: no others.
    """
    older = sorted(steps)[:-keep_last]
    return [step for step in older if not keep_every or step % keep_every]
