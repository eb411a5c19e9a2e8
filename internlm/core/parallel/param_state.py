"""State of a parameter: placement, compute dtype and main gradient.

``nn.Parameter`` has no fields for these, so every parameter carries one :class:`ParamState` as an attribute. Only this
module reads and writes that attribute; all other code calls the functions below, or takes the state from a
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
    """Global shape, this rank's shard, and the mode over which the gradient is a partial sum."""
    compute_dtype: torch.dtype | None = None
    """Dtype to compute in; None: the dtype in which the parameter is stored."""
    main_grad: Tensor | None = None
    """Tensor in which gradients are accumulated."""
    on_grad_ready: Callable[[], None] | None = None
    """Called after each accumulation of a gradient, and when autograd has finished with the parameter."""
    wait_for_all_gather: Callable[[], None] | None = None
    """Blocks until the all-gather of the last update has completed."""


# Returned for a tensor without state: reading must not attach a state to a temporary, such as a gathered weight.
_NO_STATE = ParamState()


def _state(parameter: Tensor) -> ParamState:
    """Return the state of ``parameter``, for reading; an empty state if none is attached."""
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
    """Create parameters of parallel layers on the meta device within the block.

    Their initial values depend on (seed, logical name) alone, so memory is needed only once this rank's shards are
    final. Users' own modules draw their values when they are built, and so keep their device.
    """
    global _on_meta
    outer, _on_meta = _on_meta, True
    try:
        yield
    finally:
        _on_meta = outer


def place(placement: ParamPlacement) -> nn.Parameter:
    """Create an uninitialised parameter of the placement's local shape and the default dtype.

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
        UserError: ``parameter`` has no placement; the message calls it ``name``.
    """
    placement = _state(parameter).placement
    if placement is None:
        raise UserError(
            Problem(
                f"model parameter '{name}'",
                "has no ParamPlacement, which reduction, sharding and checkpoints need",
                "Build it from the layers of internlm.core.parallel, or call place_replicated(module) on a module "
                "that every rank holds whole",
            )
        )
    return placement


def placed_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamPlacement]]:
    """Iterate over logical name, parameter and placement of each parameter of ``module``, tied ones once."""
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
        """The dtype to compute in."""
        return self.state.compute_dtype or self.parameter.dtype

    @property
    def is_fully_sharded(self) -> bool:
        """Whether ``fully_shard`` has sharded the parameter (:mod:`internlm.core.parallel.fully_sharded`)."""
        return isinstance(self.parameter, DTensor)


def named_parameters(module: nn.Module) -> list[NamedParameter]:
    """List the parameters of ``module`` in module order, tied ones once; each must have a placement."""
    return [
        NamedParameter(name, parameter, _own_state(parameter), position)
        for position, (name, parameter, _) in enumerate(placed_parameters(module))
    ]


def state_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over name and tensor of each persistent buffer of ``module``; every rank holds whole buffers."""
    state = module.state_dict()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in state)


# -- dtype ------------------------------------------------------------------------------------------------------------
def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Return the compute dtype of ``parameter``."""
    return _state(parameter).compute_dtype or parameter.dtype


def set_compute_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    """Set the compute dtype of ``parameter``, to which other code converts it before use."""
    _own_state(parameter).compute_dtype = dtype


# -- all-gathered values ----------------------------------------------------------------------------------------------
def wait_for_all_gather(parameter: Tensor) -> Tensor:
    """Wait for the all-gather of the last update of ``parameter``, and return ``parameter``.

    Code that calls the module of the parameter need not wait: the optimizer's forward hooks do.
    """
    wait = _state(parameter).wait_for_all_gather
    if wait is not None:
        wait()
    return parameter


def set_wait_for_all_gather(parameter: Tensor, wait: Callable[[], None]) -> None:
    """Set the function that :func:`wait_for_all_gather` calls for ``parameter``."""
    _own_state(parameter).wait_for_all_gather = wait


# -- gradients --------------------------------------------------------------------------------------------------------
def main_grad_of(parameter: Tensor) -> Tensor | None:
    """Return the tensor in which the gradient of ``parameter`` is accumulated, if an optimizer has attached one."""
    return _state(parameter).main_grad


def attach_main_grad(parameter: nn.Parameter, main_grad: Tensor) -> None:
    """Attach ``main_grad``, in which autograd and the parallel layers accumulate the gradient from now on."""
    _own_state(parameter).main_grad = main_grad
    if main_grad.dtype == parameter.dtype:
        parameter.grad = main_grad  # autograd adds in place to a gradient that exists
    # Always registered: the hook also signals to the optimizer that autograd has finished with the parameter.
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
    """Add ``grad`` to the main gradient of ``parameter``; without one, return ``grad`` in the parameter's shape."""
    target = main_grad_of(parameter)
    if target is None:
        return grad.view_as(parameter)
    target.add_(grad.view_as(target))
    _grad_has_grown(parameter)
    return None


def _on_accumulated(parameter: Tensor) -> None:
    """Add ``parameter.grad`` to the main gradient, if autograd allocated it separately.

    Autograd allocates one where ``.grad`` is None: the main gradient is of a wider dtype, or a user has set it to None.
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
