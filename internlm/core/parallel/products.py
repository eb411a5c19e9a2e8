"""The three matmuls of linear layers (output, dx and dw), and the communication around each.

Linears that have one input may be computed together, as a fused linear would: the input is gathered once, their outputs
are ranges of one joint output, and the gradients of the input are summed before they are reduced.

The gradient of the weight, dw, can be deferred until after the backward pass: the previous pipeline stage waits only
for dx, so dw can fill the bubbles of a pipeline (Qi et al. 2023, arXiv 2401.10241). A deferred gradient is a closure
over dy and the input, so autograd needs no second pass.

Shapes: T tokens, I input features, O output features, of all linears together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor, nn

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

    Each task computes one weight gradient, or those of linears that have one input.
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


class LinearModule(Protocol):
    """Protocol for a linear layer, whose products this module computes."""

    weight: nn.Parameter
    communicator: Communicator

    @property
    def gathered_out_shape(self) -> tuple[int, ...]:
        """Shape of the output of a token on this rank."""


class Outputs(NamedTuple):
    """Where the outputs of linears are in their joint output, [T, *shape], and how each linear communicates."""

    comms: tuple[Communicator, ...]
    """Communicators of the linears. Those of several linears do the same to the input."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of the output of each linear, for one token."""
    axis: int = 0
    """Axis of these shapes along which the outputs are joined."""

    @classmethod
    def of(cls, linears: Sequence[LinearModule], axis: int = 0) -> Outputs:
        """Return the outputs of ``linears``, joined along ``axis``."""
        return cls(tuple(x.communicator for x in linears), tuple(x.gathered_out_shape for x in linears), axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joint output of a token."""
        first, axis = self.shapes[0], self.axis
        if len(self.shapes) == 1:
            return first
        return (*first[:axis], sum(shape[axis] for shape in self.shapes), *first[axis + 1 :])

    def split(self, joint: Tensor) -> Sequence[Tensor]:
        """Split a joint tensor by linears, without copying: [T, O] → [T, *shape of each]."""
        if len(self.shapes) == 1:
            return (joint.view(joint.shape[0], *self.shapes[0]),)
        sizes = [shape[self.axis] for shape in self.shapes]
        return joint.view(joint.shape[0], *self.shape).split(sizes, self.axis + 1)

    def columns(self, joint: Tensor, index: int) -> Tensor:
        """Return what linear ``index`` has of a joint tensor as a matrix, [T, O of the linear]; copied if necessary."""
        return joint if len(self.shapes) == 1 else self.split(joint)[index].flatten(1)


def output(x: Tensor, weights: Sequence[Tensor], outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Compute the joint output of linears, y = x · Wᵀ of each.

    Returns:
        y, [tokens of the output, O], and the gathered input, [T, I].
    """
    gathered = outputs.comms[0].gather_input(x).wait()
    if len(weights) == 1:
        return _product(gathered, weights[0], outputs.comms[0]), gathered
    y = gathered.new_empty(gathered.shape[0], math.prod(outputs.shape))
    for own, weight, comm in zip(outputs.split(y), weights, outputs.comms, strict=True):
        own.copy_(_product(gathered, weight, comm).view_as(own))
    return y, gathered


def _product(x: Tensor, weight: Tensor, comm: Communicator) -> Tensor:
    packed = packed_linear(x, weight)
    if packed is not None:
        return comm.reduce_output(packed)
    matrix = comm.gather_weight(weight)
    y = comm.reduce_output(gemm.linear(x, matrix))
    comm.release_weight(matrix)
    return y


def gradients(
    dy: Tensor,
    x: Tensor,
    is_gathered: bool,
    weights: Sequence[Tensor],
    outputs: Outputs,
    needs_x: bool,
    needs_weights: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute the gradients of the input and of the weights of linears.

    Args:
        dy: Gradient of the joint output, [T, O], as returned by ``comm.gather_grad_output``.
        x: Input of the linears: gathered, [T, I], or that of this rank, [tokens of this rank, I], to be gathered again.
        is_gathered: Whether ``x`` is gathered, since it was saved so for backward.
        weights: Weights of the linears, as this rank holds them.
        outputs: Outputs of the linears.
        needs_x: Whether dx is needed.
        needs_weights: For each weight, whether dw is needed.

    Returns:
        dx, [tokens of this rank, I], and dw of each weight, of its shape; None for a gradient that is not needed. dw is
        also None if the weight has a main gradient: dw is then added to it, now or by a task of :func:`deferring`.
    """
    gather = Pending if is_gathered else outputs.comms[0].gather_input
    needed = [index for index, is_needed in enumerate(needs_weights) if is_needed]
    deferred = [deferred_tasks(weights[index]) for index in needed]
    tasks = None if None in deferred or not deferred else deferred[0]
    # Each collective starts before the matmul that hides it: the gather of the input before the matmul for dx, the
    # reduction of dx before the matmul for dw.
    pending_input = gather(x) if needed and tasks is None else None
    pending_dx = _grad_input(dy, weights, outputs) if needs_x else None
    dws: list[Tensor | None] = [None] * len(weights)
    if pending_input is not None:
        inputs = pending_input.wait()
        for i in needed:
            dws[i] = _grad_weight(weights[i], outputs.columns(dy, i), inputs, outputs.comms[i])
    if tasks is not None:
        # A deferred gradient gathers its input when its task runs; until then it holds only this rank's shard.
        tasks.append(partial(_grad_weights_later, [(weights[i], i) for i in needed], dy, x, gather, outputs))
    return pending_dx.wait() if pending_dx else None, dws


def _grad_weights_later(
    weights: Sequence[tuple[Tensor, int]],
    dy: Tensor,
    kept: Tensor,
    gather: Callable[[Tensor], Pending],
    outputs: Outputs,
) -> None:
    gathered = gather(kept).wait()
    for weight, index in weights:
        _grad_weight(weight, outputs.columns(dy, index), gathered, outputs.comms[index])


def _grad_input(dy: Tensor, weights: Sequence[Tensor], outputs: Outputs) -> Pending:
    """Start reducing dx, the sum of the gradients that the linears have of their input."""
    dx: Tensor | None = None
    # From the last linear to the first, the order in which isp prefetches weights in backward.
    for index in reversed(range(len(weights))):
        matrix = outputs.comms[index].gather_weight(weights[index], backward=True)
        columns = outputs.columns(dy, index)
        dx = gemm.grad_input(columns, matrix) if dx is None else gemm.add_grad_input(dx, columns, matrix)
        outputs.comms[index].release_weight(matrix)
    assert dx is not None
    return outputs.comms[0].reduce_grad_input(dx)


def _grad_weight(weight: Tensor, dy: Tensor, x: Tensor, comm: Communicator) -> Tensor | None:
    """Compute dw = dyᵀ · x and add it to the main gradient; without a main gradient, return this rank's shard of dw."""
    if comm.splits_weight:
        # A temporary, since the gradient of the whole weight is reduced to this rank's shard first.
        return comm.reduce_grad_weight(weight_grad(dy, x), lambda shard: add_grad(weight, shard))
    return add_weight_grad(weight, dy, x)  # in place, without a temporary
