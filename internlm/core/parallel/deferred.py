"""Gradients of weights, put off: what waits for the gradient of a layer's input need not wait for that of its weight,
which can fill time when there is nothing else to do (Qi et al. 2023, arXiv 2401.10241)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from internlm.core.parallel.main_grad import main_grad_of

#: Adds one gradient to its ``main_grad``.
Task = Callable[[], object]

_tasks: list[Task] | None = None


@contextmanager
def deferring() -> Iterator[list[Task]]:
    """Backward passes within the block leave the gradients of linears to the tasks in the list, to be run later."""
    global _tasks
    outer, _tasks = _tasks, []
    try:
        yield _tasks
    finally:
        _tasks = outer


def deferred_tasks(weight: Tensor) -> list[Task] | None:
    """Where to leave the gradient of ``weight``; None: it is wanted now. Without a ``main_grad`` it always is."""
    return None if main_grad_of(weight) is None else _tasks
