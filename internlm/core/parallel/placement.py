"""A contiguous run of a flattened tensor as boxes of the tensor itself. Pure arithmetic.

ZeRO cuts flat buffers anywhere, so a shard may begin and end within a row. In the tensor's own axes such a run is at
most 2 · dims − 1 boxes: a part of the first row, whole rows, a part of the last row, and so on inwards.

Where each parameter lives: one :class:`ParamPlacement` on every parameter, set where the parameter is created.

Gradient reduction, norm clipping, ZeRO, checkpoints and initialisation all read it; nothing guesses from names or
module types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from internlm.core.context.layout import ParallelMode
from internlm.core.context.random import derived_seed
from internlm.utils.errors import Problem, UserError


@dataclass(frozen=True)
class TensorSlice:
    """Offsets and sizes in each dimension, and the run [start, stop) of the flattened tensor that it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def slices_of_run(shape: Sequence[int], start: int, stop: int) -> Iterator[TensorSlice]:
    """The boxes of elements [start, stop) of a row-major tensor of ``shape``."""
    if start >= stop:
        return
    if len(shape) == 0:
        yield TensorSlice((), (), start, stop)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows: first … last - 1
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop, row)
        return
    yield from _within_row(shape, first - 1, start, first * row, row)
    if first < last:
        yield TensorSlice((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row, last * row)
    yield from _within_row(shape, last, last * row, stop, row)


def _within_row(shape: Sequence[int], index: int, start: int, stop: int, row: int) -> Iterator[TensorSlice]:
    base = index * row
    for box in slices_of_run(shape[1:], start - base, stop - base):
        yield TensorSlice((index, *box.offsets), (1, *box.sizes), box.start + base, box.stop + base)


#: Fills a tensor of the parameter's global shape, drawing from the generator.
Init = Callable[[Tensor, torch.Generator], Tensor]


def normal(std: float) -> Init:
    """Zero-mean normal values of deviation ``std``."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Init:
    """The same value everywhere."""
    return lambda tensor, generator: tensor.fill_(value)


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` equal ones: along ``axis``; or, where that is None, of the rows that all axes but the
    last make together, whose number is rounded up (what the last parts hold too much is padding, and zero)."""

    mode: ParallelMode
    index: int
    count: int
    axis: int | None = None


@dataclass(frozen=True)
class ParamPlacement:
    """Global shape of a parameter, which part of it this rank holds, and what is still to be done to its gradient."""

    global_shape: tuple[int, ...]
    init: Init
    #: The part that this rank holds; None: all of it.
    shard: Shard | None = None
    #: The mode over whose group the gradient is still a partial sum after backward (beside data parallelism).
    partial_over: ParallelMode | None = None
    #: Norms and biases are False: weight decay may be told to leave them out.
    is_matrix: bool = True
    #: A matrix between hidden units, as embedding and head are not: some optimizers treat these in their own way.
    is_hidden: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """As a matrix: all axes but the last make its rows."""
        return self._rows, self.global_shape[-1]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part held here, padding included."""
        if self.shard is None:
            return self.global_shape
        if self.shard.axis is None:
            return (-(-self._rows // self.shard.count), self.global_shape[-1])
        shape = list(self.global_shape)
        shape[self.shard.axis] //= self.shard.count
        return tuple(shape)

    def slices(self, start: int, stop: int) -> Iterator[TensorSlice]:
        """Elements [start, stop) of the flattened local part as boxes of the whole tensor, without padding: offsets in
        the whole, ``start`` and ``stop`` in the local part."""
        if self.shard is None or self.shard.axis is None:
            first, last = self._run
            for box in slices_of_run(self.global_shape, first + start, min(first + stop, last)):
                yield replace(box, start=box.start - first, stop=box.stop - first)
            return
        axis, shape = self.shard.axis, self.local_shape
        for box in slices_of_run(shape, start, stop):
            offsets = list(box.offsets)
            offsets[axis] += self.shard.index * shape[axis]
            yield replace(box, offsets=tuple(offsets))

    def local_part(self, whole: Tensor) -> Tensor:
        """The view of ``whole`` (of the global shape) that is held here, without padding."""
        if self.shard is None:
            return whole
        if self.shard.axis is None:
            first, last = self._run
            return whole.view(-1)[first:last].view(-1, whole.shape[-1])
        length = self.local_shape[self.shard.axis]
        return whole.narrow(self.shard.axis, self.shard.index * length, length)

    @property
    def _rows(self) -> int:
        return math.prod(self.global_shape[:-1])

    @property
    def _run(self) -> tuple[int, int]:
        """Which elements of the flattened whole are held here, for parts that are a run of rows."""
        total, size = math.prod(self.global_shape), math.prod(self.local_shape)
        first = min(self.shard.index * size, total) if self.shard else 0
        return first, min(first + size, total)


def place(placement: ParamPlacement) -> nn.Parameter:
    """A new parameter, its values not yet drawn, on the default device and of the default type."""
    parameter = nn.Parameter(torch.empty(placement.local_shape))
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: nn.Parameter, name: str) -> ParamPlacement:
    """The placement of ``parameter``; raises :class:`UserError` where it has none."""
    placement: ParamPlacement | None = getattr(parameter, "placement", None)
    if placement is None:
        raise UserError(
            Problem(
                f"model parameter '{name}'",
                "has no ParamPlacement, so nobody knows how to reduce, shard or save it",
                "Build it from the layers of internlm.core.parallel, or call place_replicated(module) on a module "
                "that every rank holds whole",
            )
        )
    return placement


def placed_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamPlacement]]:
    """Logical name, parameter and placement of each parameter, a shared one once."""
    for name, parameter in module.named_parameters():
        yield name, parameter, placement_of(parameter, name)


def state_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each buffer that belongs to the state of ``module``; every rank holds it whole."""
    state = module.state_dict()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in state)


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator seeded by (seed, logical name), so that the layout does not matter.

    Values are drawn in float32 for the global shape (float64 keeps their bits), and each rank keeps its part.
    """
    for name, parameter, placement in placed_parameters(module):
        generator = torch.Generator().manual_seed(derived_seed(seed, "parameter", name))
        whole = placement.init(torch.empty(placement.global_shape, dtype=torch.float32, device="cpu"), generator)
        part = placement.local_part(whole)
        parameter.view(-1)[: part.numel()].copy_(part.reshape(-1))
        parameter.view(-1)[part.numel() :].zero_()  # padding
