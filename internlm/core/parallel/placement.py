"""Where each parameter lives: one :class:`ParamPlacement` on every parameter, set where the parameter is created.

Gradient reduction, norm clipping, ZeRO, checkpoints and initialisation all read it; nothing guesses from names or
module types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.core.context.parallel_mode import ParallelMode
from internlm.core.context.random import derived_seed
from internlm.utils.errors import Problem, UserError

#: Fills a tensor of the parameter's global shape, drawing from the generator.
Init = Callable[[Tensor, torch.Generator], Tensor]


def normal(std: float) -> Init:
    """Zero-mean normal values of deviation ``std``."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Init:
    """The same value everywhere."""
    return lambda tensor, generator: tensor.fill_(value)


@dataclass(frozen=True)
class ParamPlacement:
    """Global shape of a parameter, which part of it this rank holds, and what is still to be done to its gradient."""

    global_shape: tuple[int, ...]
    init: Init
    #: The dimension that is split over ``shard_mode``, this rank holding part ``shard_index`` of ``shard_count``.
    shard_dim: int | None = None
    shard_mode: ParallelMode | None = None
    shard_index: int = 0
    shard_count: int = 1
    #: Modes over whose groups the gradient is still a partial sum after backward (beside data parallelism).
    partial_over: tuple[ParallelMode, ...] = ()
    #: Norms and biases are False: weight decay may be told to leave them out.
    is_matrix: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part held here."""
        shape = list(self.global_shape)
        if self.shard_dim is not None:
            shape[self.shard_dim] //= self.shard_count
        return tuple(shape)

    @property
    def offset(self) -> tuple[int, ...]:
        """Where that part begins, in each dimension."""
        offset = [0] * len(self.global_shape)
        if self.shard_dim is not None:
            offset[self.shard_dim] = self.shard_index * self.local_shape[self.shard_dim]
        return tuple(offset)

    def local_part(self, whole: Tensor) -> Tensor:
        """The view of ``whole`` (of the global shape) that is held here."""
        for dim, (start, length) in enumerate(zip(self.offset, self.local_shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


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


def place_replicated(module: nn.Module) -> nn.Module:
    """Mark every parameter of ``module`` that has no placement as held whole by each rank, its values as they are
    now."""
    for parameter in module.parameters():
        if not hasattr(parameter, "placement"):
            values = parameter.detach().clone()
            parameter.placement = ParamPlacement(  # type: ignore[attr-defined]
                tuple(parameter.shape), init=_copy_of(values), is_matrix=parameter.dim() > 1
            )
    return module


def _copy_of(values: Tensor) -> Init:
    return lambda tensor, generator: tensor.copy_(values)


def placed_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamPlacement]]:
    """Logical name, parameter and placement of each parameter, a shared one once."""
    for name, parameter in module.named_parameters():
        yield name, parameter, placement_of(parameter, name)


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator seeded by (seed, logical name), so that the layout does not matter.

    Values are drawn in float32 for the global shape (float64 keeps their bits), and each rank keeps its part.
    """
    for name, parameter, placement in placed_parameters(module):
        generator = torch.Generator().manual_seed(derived_seed(seed, "parameter", name))
        whole = placement.init(torch.empty(placement.global_shape, dtype=torch.float32, device="cpu"), generator)
        parameter.copy_(placement.local_part(whole))
