"""State of a parameter: its placement, the dtype it is computed in, and where its gradient goes.

``nn.Parameter`` has no room for any of this, so every parameter carries one :class:`ParamState` as an attribute. This
module alone reads and writes that attribute; all other code calls the functions below, or takes the state from a
:class:`NamedParameter`.

The optimizer gives each parameter a *main gradient*: a view of its flat gradient buffer, of the parameter's shape,
perhaps of a wider dtype. Layers that compute a weight gradient themselves add it there and return None to autograd.
Without a main gradient (a model that is used without our optimizer) they return the gradient, as any module does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from internlm.core.parallel.placement import ParamPlacement
from internlm.ops import gemm
from internlm.utils.dtype import grad_dtype
from internlm.utils.errors import Problem, UserError

_ATTRIBUTE = "param_state"


@dataclass(kw_only=True)
class ParamState:
    """State that is attached to one parameter."""

    placement: ParamPlacement | None = None
    """Global shape, the shard of this rank, and what is still partial in the gradient."""
    compute_dtype: torch.dtype | None = None
    """The dtype to compute in, where it is not the one in which the parameter is stored."""
    main_grad: Tensor | None = None
    """Where gradients are accumulated."""
    on_grad_ready: Callable[[], None] | None = None
    """Called whenever the gradient has grown, or autograd is done with the parameter."""
    wait_for_all_gather: Callable[[], None] | None = None
    """Blocks until the values of the last update have arrived from the other ranks."""


# What reads return of a tensor without state: they must not attach one to a temporary, such as a gathered weight.
_NO_STATE = ParamState()


def _state(parameter: Tensor) -> ParamState:
    """Return the state of ``parameter``, for reading; an empty one where nothing was attached."""
    state: ParamState = getattr(parameter, _ATTRIBUTE, _NO_STATE)
    return state


def _own_state(parameter: Tensor) -> ParamState:
    """Return the state of ``parameter``, for writing; it is created by the first write."""
    if not hasattr(parameter, _ATTRIBUTE):
        setattr(parameter, _ATTRIBUTE, ParamState())
    return _state(parameter)


# -- placement --------------------------------------------------------------------------------------------------------
_on_meta = False


@contextmanager
def deferred_memory() -> Iterator[None]:
    """Create parameters of parallel layers on the meta device within the scope; everything else as usual.

    Their initial values depend on (seed, logical name) alone, so memory is needed only once it is final which elements
    this rank holds. A module of a user's own draws its values as it is built, and so keeps its device.
    """
    global _on_meta
    outer, _on_meta = _on_meta, True
    try:
        yield
    finally:
        _on_meta = outer


def place(placement: ParamPlacement) -> nn.Parameter:
    """Create a parameter of the placement's local shape and of the default dtype, its values not yet drawn.

    It is on the default device, or on the meta device within :func:`deferred_memory`.
    """
    parameter = nn.Parameter(torch.empty(placement.local_shape, device="meta" if _on_meta else None))
    set_placement(parameter, placement)
    return parameter


def set_placement(parameter: nn.Parameter, placement: ParamPlacement) -> None:
    """Attach ``placement`` to ``parameter``."""
    _own_state(parameter).placement = placement


def has_placement(parameter: nn.Parameter) -> bool:
    """Return whether a placement is attached to ``parameter``."""
    return _state(parameter).placement is not None


def placement_of(parameter: nn.Parameter, name: str = "weight") -> ParamPlacement:
    """Return the placement of ``parameter``.

    Raises:
        UserError: ``parameter`` has none; the message calls it ``name``.
    """
    placement = _state(parameter).placement
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
    """Iterate over logical name, parameter and placement of each parameter of ``module``, a tied one once."""
    for name, parameter in module.named_parameters():
        yield name, parameter, placement_of(parameter, name)


class NamedParameter(NamedTuple):
    """A parameter with its logical name, its state, and its position in the model."""

    name: str
    parameter: nn.Parameter
    state: ParamState
    position: int = 0

    @property
    def placement(self) -> ParamPlacement:
        """The placement of the parameter."""
        assert self.state.placement is not None, f"{self.name} has no placement"
        return self.state.placement

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the parameter is computed with."""
        return self.state.compute_dtype or self.parameter.dtype

    @property
    def is_fully_sharded(self) -> bool:
        """Whether ``fully_shard`` has sharded the parameter (:mod:`internlm.core.parallel.fully_sharded`)."""
        return isinstance(self.parameter, DTensor)


def named_parameters(module: nn.Module) -> list[NamedParameter]:
    """List the parameters of ``module`` in its order, a tied one once; each must have a placement."""
    return [
        NamedParameter(name, parameter, _own_state(parameter), position)
        for position, (name, parameter, _) in enumerate(placed_parameters(module))
    ]


def state_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over name and tensor of each persistent buffer of ``module``; every rank holds it whole."""
    state = module.state_dict()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in state)


# -- dtype ------------------------------------------------------------------------------------------------------------
def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which ``parameter`` is computed with."""
    return _state(parameter).compute_dtype or parameter.dtype


def set_compute_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    """Record that ``parameter`` is converted to ``dtype`` before it is computed with."""
    _own_state(parameter).compute_dtype = dtype


# -- values that are on their way -------------------------------------------------------------------------------------
def wait_for_all_gather(parameter: Tensor) -> Tensor:
    """Return ``parameter`` with the values of its last update, once they have arrived from the other ranks.

    Code that calls the module which owns the parameter need not do this: the optimizer's forward hooks do.
    """
    wait = _state(parameter).wait_for_all_gather
    if wait is not None:
        wait()
    return parameter


def set_wait_for_all_gather(parameter: Tensor, wait: Callable[[], None]) -> None:
    """Have :func:`wait_for_all_gather` of ``parameter`` call ``wait``."""
    _own_state(parameter).wait_for_all_gather = wait


# -- gradients --------------------------------------------------------------------------------------------------------
def main_grad_of(parameter: Tensor) -> Tensor | None:
    """Return the tensor in which the gradient of ``parameter`` is accumulated, if an optimizer has attached one."""
    return _state(parameter).main_grad


def attach_main_grad(parameter: nn.Parameter, main_grad: Tensor) -> None:
    """Accumulate gradients of ``parameter`` in ``main_grad``, those of our layers and those of autograd alike."""
    _own_state(parameter).main_grad = main_grad
    if main_grad.dtype == parameter.dtype:
        parameter.grad = main_grad  # autograd adds in place to a gradient that exists
    # Registered in any case: it also tells the optimizer that autograd is done with a parameter.
    parameter.register_post_accumulate_grad_hook(_on_accumulated)


def add_weight_grad(parameter: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Add dyᵀ·x to the main gradient of ``parameter``; dy: [T, O], x: [T, I].

    Returns:
        The gradient itself, of the shape of ``parameter``, if there is no main gradient.
    """
    target = main_grad_of(parameter)
    if target is None:
        return weight_grad(dy, x, grad_dtype(parameter)).view_as(parameter)
    gemm.accumulate_grad_weight(target.view(dy.shape[1], x.shape[1]), dy, x)
    _grad_has_grown(parameter)
    return None


def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return dyᵀ·x as a new tensor [O, I], of ``dtype`` if it is given; dy: [T, O], x: [T, I]."""
    grad = dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
    gemm.accumulate_grad_weight(grad, dy, x, accumulate=False)
    return grad


def add_grad(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """Add ``grad`` to the main gradient of ``parameter``; return it, in the parameter's shape, if there is none."""
    target = main_grad_of(parameter)
    if target is None:
        return grad.view_as(parameter)
    target.add_(grad.view_as(target))
    _grad_has_grown(parameter)
    return None


def _on_accumulated(parameter: Tensor) -> None:
    """Move a gradient that autograd has allocated itself into the main gradient.

    Autograd does so where ``.grad`` is None: the main gradient is of a wider dtype, or a user has set it to None.
    """
    grad, main_grad = parameter.grad, main_grad_of(parameter)
    assert main_grad is not None, "the hook is registered by attach_main_grad"
    # By address: autograd may replace the tensor object and keep the memory.
    if grad is not None and grad.data_ptr() != main_grad.data_ptr():
        main_grad.add_(grad)
        parameter.grad = main_grad if main_grad.dtype == parameter.dtype else None
    _grad_has_grown(parameter)


def _grad_has_grown(parameter: Tensor) -> None:
    callback = _state(parameter).on_grad_ready
    if callback is not None:
        callback()
