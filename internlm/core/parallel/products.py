"""Gradients of weights, put off: what waits for the gradient of a layer's input need not wait for that of its weight,
which can fill time when there is nothing else to do (Qi et al. 2023, arXiv 2401.10241).

The three products of a linear layer, and the places where ranks may talk.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from internlm.core.parallel.collectives import Pending
from internlm.core.parallel.communicator import Communicator
from internlm.core.parallel.param_state import add_grad, add_weight_grad, main_grad_of, weight_grad
from internlm.ops import gemm

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


def output(x: Tensor, weight: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """x · Wᵀ, [T, O], and the input that the product had, [T, I]."""
    inputs = comm.gather_input(x).wait()
    matrix = comm.gather_weight(weight)
    y = comm.reduce_output(gemm.linear(inputs, matrix))
    comm.release_weight(matrix)
    return y, inputs


def gradients(
    dy: Tensor,
    x: Tensor,
    gathered: Tensor | None,
    weight: Tensor,
    comm: Communicator,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and of the weight, from that of the product, [T, O], after ``comm.gather_grad_output``; that of a
    weight with a ``main_grad`` is added there instead, now or later (:mod:`internlm.core.parallel.products`).

    ``gathered``: what the product had for ``x``, where it was kept.
    """
    fetch, kept = (Pending, gathered) if gathered is not None else (comm.gather_input, x)
    later = deferred_tasks(weight) if needs_weight else None
    # Each begins what runs under the product that comes after it.
    inputs_on_their_way = fetch(kept) if needs_weight and later is None else None
    dx_on_its_way = _grad_input(dy, weight, comm) if needs_x else None
    dw = _weight_grad(weight, dy, inputs_on_their_way.wait(), comm) if inputs_on_their_way else None
    if later is not None:
        later.append(partial(_weight_grad_later, weight, dy, kept, fetch, comm))
    return dx_on_its_way.wait() if dx_on_its_way else None, dw


def _weight_grad_later(
    weight: Tensor, dy: Tensor, kept: Tensor, fetch: Callable[[Tensor], Pending], comm: Communicator
) -> None:
    _weight_grad(weight, dy, fetch(kept).wait(), comm)


def _grad_input(dy: Tensor, weight: Tensor, comm: Communicator) -> Pending:
    matrix = comm.gather_weight(weight, backward=True)
    dx = gemm.grad_input(dy, matrix)
    comm.release_weight(matrix)
    return comm.reduce_grad_input(dx)


def _weight_grad(weight: Tensor, dy: Tensor, x: Tensor, comm: Communicator) -> Tensor | None:
    """In place where the weight is whole; by way of a temporary where its gradient is reduced to this rank's shard
    first."""
    if comm.splits_weight:
        return comm.reduce_grad_weight(weight_grad(dy, x), lambda shard: add_grad(weight, shard))
    return add_weight_grad(weight, dy, x)
