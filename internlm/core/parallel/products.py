"""The three matmuls of a linear layer (output, dx and dw), and the communication around each.

The gradient of the weight, dw, can be deferred until after the backward pass: the previous pipeline stage waits only
for dx, so dw can fill the bubbles of a pipeline (Qi et al. 2023, arXiv 2401.10241). A deferred gradient is a closure
over dy and the input, so autograd needs no second pass.

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
from internlm.ops.cpu.packed_weights import packed_linear

#: Function that computes one deferred weight gradient and adds it to the main gradient.
Task = Callable[[], object]

_tasks: list[Task] | None = None


@contextmanager
def deferring() -> Iterator[list[Task]]:
    """Defer the weight gradients of backward passes in the ``with`` block, and yield the list of deferred tasks.

    Each task computes one weight gradient.
    """
    global _tasks
    outer, _tasks = _tasks, []
    try:
        yield _tasks
    finally:
        _tasks = outer


def deferred_tasks(weight: Tensor) -> list[Task] | None:
    """Return the task list to which the gradient of ``weight`` is deferred; None if it must be computed immediately.

    It is computed immediately outside of :func:`deferring`, and if ``weight`` has no main gradient, since the backward
    function must then return it to autograd.
    """
    return None if main_grad_of(weight) is None else _tasks


def output(x: Tensor, weight: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Compute the output y = x · Wᵀ of a linear.

    Returns:
        y, [tokens of the output, O], and the gathered input, [T, I].
    """
    gathered = comm.gather_input(x).wait()
    packed = packed_linear(gathered, weight)
    if packed is not None:
        return comm.reduce_output(packed), gathered
    matrix = comm.gather_weight(weight)
    y = comm.reduce_output(gemm.linear(gathered, matrix))
    comm.release_weight(matrix)
    return y, gathered


def gradients(
    dy: Tensor,
    x: Tensor,
    is_gathered: bool,
    weight: Tensor,
    comm: Communicator,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of a linear's input and weight.

    Args:
        dy: Gradient of the output, [T, O], as returned by ``comm.gather_grad_output``.
        x: Input of the layer: gathered, [T, I], or that of this rank, [tokens of this rank, I], to be gathered again.
        is_gathered: Whether ``x`` is gathered, since it was saved so for backward.
        weight: Weight of the layer, as this rank holds it.
        comm: Communicator of the layer.
        needs_x: Whether dx is needed.
        needs_weight: Whether dw is needed.

    Returns:
        dx, [tokens of this rank, I], and dw, of the shape of ``weight``; None for a gradient that is not needed. dw is
        also None if the weight has a main gradient: dw is then added to it, now or by a task of :func:`deferring`.
    """
    gather = Pending if is_gathered else comm.gather_input
    tasks = deferred_tasks(weight) if needs_weight else None
    # Each collective starts before the matmul that hides it: the gather of the input before the matmul for dx, the
    # reduction of dx before the matmul for dw.
    pending_input = gather(x) if needs_weight and tasks is None else None
    pending_dx = _grad_input(dy, weight, comm) if needs_x else None
    dw = _grad_weight(weight, dy, pending_input.wait(), comm) if pending_input else None
    if tasks is not None:
        # A deferred gradient gathers its input when its task runs; until then it holds only this rank's shard.
        tasks.append(partial(_grad_weight_later, weight, dy, x, gather, comm))
    return pending_dx.wait() if pending_dx else None, dw


def _grad_weight_later(
    weight: Tensor, dy: Tensor, kept: Tensor, gather: Callable[[Tensor], Pending], comm: Communicator
) -> None:
    _grad_weight(weight, dy, gather(kept).wait(), comm)


def _grad_input(dy: Tensor, weight: Tensor, comm: Communicator) -> Pending:
    matrix = comm.gather_weight(weight, backward=True)
    dx = gemm.grad_input(dy, matrix)
    comm.release_weight(matrix)
    return comm.reduce_grad_input(dx)


def _grad_weight(weight: Tensor, dy: Tensor, x: Tensor, comm: Communicator) -> Tensor | None:
    """Compute dw = dyᵀ · x and add it to the main gradient; without a main gradient, return this rank's shard of dw."""
    if comm.splits_weight:
        # A temporary, since the gradient of the whole weight is reduced to this rank's shard first.
        return comm.reduce_grad_weight(weight_grad(dy, x), lambda shard: add_grad(weight, shard))
    return add_weight_grad(weight, dy, x)  # in place, without a temporary
