"""State of a parameter: placement, compute dtype and main gradient.

``nn.Parameter`` has no fields for these, so every parameter carries one :class:`ParamState` as an attribute. Only this
module reads and writes that attribute; all other code calls the functions below, or takes the state from a
:class:`NamedParameter`.

The optimizer attaches a *main gradient* to each parameter: a view of its flat gradient buffer that has the parameter's
shape and the same or a wider dtype. Layers that compute a weight gradient themselves add it to the main gradient and
return None to autograd. Without a main gradient (a model used without our optimizer) they return the weight gradient.

At the start of a step the main gradient is marked as *stale*: the first gradient overwrites it. Setting it to zero and
adding to it would write and read it once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from internlm.core.parallel.placement import ParamPlacement
from internlm.ops import gemm
from internlm.utils.dtype import grad_dtype
from internlm.utils.errors import Problem, UserError
from internlm.utils.same_memory import same_memory

_ATTRIBUTE = "param_state"


@dataclass(kw_only=True)
class ParamState:
    """State attached to one parameter: placement, compute dtype, main gradient and callbacks."""

    placement: ParamPlacement | None = None
    """Global shape, this rank's shard, and the mode over whose group the gradient must be summed."""
    compute_dtype: torch.dtype | None = None
    """Dtype to compute in; None: the dtype in which the parameter is stored."""
    main_grad: Tensor | None = None
    """Tensor of the parameter's shape in which gradients are accumulated."""
    stale: set[Tensor] = field(default_factory=set)
    """Parameters whose main gradient is still that of an earlier step, this one or not; shared by a param group."""
    on_grad_ready: Callable[[], None] | None = None
    """Callback that runs after each gradient accumulation, and when autograd has finished with the parameter."""
    wait_for_all_gather: Callable[[], None] | None = None
    """Callback that blocks until the all-gather of the parameter's last update has completed."""


# Returned for a tensor without state: reading must not attach a state to a temporary, such as a gathered weight.
_NO_STATE = ParamState()


def _state(parameter: Tensor) -> ParamState:
    """Return the state of ``parameter``, for reading; an empty state if none is attached."""
    state: ParamState = getattr(parameter, _ATTRIBUTE, _NO_STATE)
    return state


def _own_state(parameter: Tensor) -> ParamState:
    """Return the state of ``parameter``, for writing; attach an empty state if there is none."""
    if not hasattr(parameter, _ATTRIBUTE):
        setattr(parameter, _ATTRIBUTE, ParamState())
    return _state(parameter)


# -- placement --------------------------------------------------------------------------------------------------------
_on_meta = False


@contextmanager
def deferred_memory() -> Iterator[None]:
    """Create parameters of parallel layers on the meta device in the ``with`` block.

    Their initial values depend on seed and logical name only, so memory can be allocated after the shards of this rank
    are final. Other modules draw their values when they are built, so their parameters stay on the default device.
    """
    global _on_meta
    outer, _on_meta = _on_meta, True
    try:
        yield
    finally:
        _on_meta = outer


def place(placement: ParamPlacement) -> nn.Parameter:
    """Create an uninitialised parameter with the local shape of ``placement`` and the default dtype.

    The parameter is on the default device, or on the meta device in a :func:`deferred_memory` context.
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

    Args:
        parameter: Parameter of a model.
        name: Name of the parameter in the error message.

    Raises:
        UserError: The parameter has no placement.
    """
    placement = _state(parameter).placement
    if placement is None:
        raise UserError(
            Problem(
                f"model parameter '{name}'",
                "has no ParamPlacement, which gradient reduction, sharding and checkpoints need",
                "Build its module from the layers of internlm.core.parallel, or call place_replicated(module) if "
                "every rank holds the whole module",
            )
        )
    return placement


def placed_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamPlacement]]:
    """Yield logical name, parameter and placement of each parameter of ``module``; tied parameters occur once.

    Raises:
        UserError: A parameter has no placement.
    """
    for name, parameter in module.named_parameters():
        yield name, parameter, placement_of(parameter, name)


class NamedParameter(NamedTuple):
    """Parameter with its logical name, its state, and its position in module order."""

    name: str
    parameter: nn.Parameter
    state: ParamState
    position: int = 0

    @property
    def placement(self) -> ParamPlacement:
        """Placement of the parameter."""
        assert self.state.placement is not None, f"{self.name} has no placement"
        return self.state.placement

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the parameter is used in computations."""
        return self.state.compute_dtype or self.parameter.dtype

    @property
    def is_fully_sharded(self) -> bool:
        """Whether ``fully_shard`` has sharded the parameter (:mod:`internlm.core.parallel.fully_sharded`)."""
        return isinstance(self.parameter, DTensor)


def named_parameters(module: nn.Module) -> list[NamedParameter]:
    """Return the parameters of ``module`` in module order; tied parameters occur once.

    Raises:
        UserError: A parameter has no placement.
    """
    return [
        NamedParameter(name, parameter, _own_state(parameter), position)
        for position, (name, parameter, _) in enumerate(placed_parameters(module))
    ]


def state_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each persistent buffer of ``module``; buffers are never sharded."""
    if buffers := dict(module.named_buffers()):
        state = module.state_dict()
        yield from ((name, buffer) for name, buffer in buffers.items() if name in state)


# -- dtype ------------------------------------------------------------------------------------------------------------
def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which ``parameter`` is used in computations; by default its own."""
    return _state(parameter).compute_dtype or parameter.dtype


def set_compute_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    """Set the dtype to which ``parameter`` is converted before it is used in computations."""
    _own_state(parameter).compute_dtype = dtype


# -- all-gathered values ----------------------------------------------------------------------------------------------
def wait_for_all_gather(parameter: Tensor) -> Tensor:
    """Block until the all-gather of the last update of ``parameter`` has completed, and return ``parameter``.

    Only code that bypasses the forward of the parameter's module must call this: for all other code, a forward hook
    of the optimizer waits.
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
    """Return the main gradient of ``parameter``; None if no optimizer has attached one."""
    return _state(parameter).main_grad


def accumulated_grad(parameter: Tensor) -> Tensor | None:
    """Return what the main gradient of ``parameter`` has accumulated in this step; None if it has no main gradient."""
    state = _state(parameter)
    stale = state.main_grad is not None and parameter in state.stale
    return torch.zeros_like(state.main_grad) if stale and state.main_grad is not None else state.main_grad


def attach_main_grad(parameter: nn.Parameter, main_grad: Tensor) -> None:
    """Attach ``main_grad``, in which autograd and parallel layers then accumulate the gradient of ``parameter``.

    Args:
        parameter: Parameter of a model.
        main_grad: Tensor of the parameter's shape, of the same or a wider dtype.
    """
    _own_state(parameter).main_grad = main_grad
    if main_grad.dtype == parameter.dtype:
        parameter.grad = main_grad  # autograd adds in place to a gradient that exists
    # Always registered: the hook also signals to the optimizer that autograd has finished with the parameter.
    parameter.register_post_accumulate_grad_hook(_on_accumulated)


def mark_stale(parameters: Iterable[nn.Parameter]) -> set[Tensor]:
    """Mark the main gradients of ``parameters`` as those of an earlier step; their ``grad`` is None until the next.

    Returns:
        The set of those that are still stale.
    """
    stale: set[Tensor] = set(parameters)
    for parameter in stale:
        _own_state(parameter).stale = stale
        parameter.grad = None
    return stale


def begin_accumulation(parameter: Tensor) -> bool:
    """Return whether to add the next gradient to the main gradient of ``parameter``; False: overwrite it.

    The caller must do so at once: from now on, the main gradient counts as one of this step.
    """
    state = _state(parameter)
    adds = parameter not in state.stale
    state.stale.discard(parameter)
    if state.main_grad is not None and state.main_grad.dtype == parameter.dtype:
        parameter.grad = state.main_grad  # autograd adds in place to a gradient that exists
    return adds


def complete_main_grad(parameter: nn.Parameter) -> None:
    """Set the main gradient of ``parameter`` to ``parameter.grad``, or else to zero, if it has got no gradient yet."""
    state = _state(parameter)
    if parameter in state.stale and state.main_grad is not None:
        grad = parameter.grad  # of a script that assigns one itself
        begin_accumulation(parameter)
        if grad is None:
            state.main_grad.zero_()
        else:
            state.main_grad.copy_(grad)


def add_weight_grad(parameter: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Add dyᵀ·x to the main gradient of ``parameter``; dy: [T, O], x: [T, I].

    Returns:
        None if there is a main gradient, else dyᵀ·x in the shape of ``parameter``.
    """
    target = main_grad_of(parameter)
    if target is None:
        return weight_grad(dy, x, grad_dtype(parameter)).view_as(parameter)
    gemm.accumulate_grad_weight(target.view(dy.shape[1], x.shape[1]), dy, x, begin_accumulation(parameter))
    _grad_has_grown(parameter)
    return None


def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute dyᵀ·x as a new tensor of ``dtype``, by default that of ``dy``: [T, O], [T, I] → [O, I]."""
    return gemm.grad_weight(dy, x, dtype)


def add_grad(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """Add ``grad`` to the main gradient of ``parameter``.

    Returns:
        None if there is a main gradient, else ``grad`` in the shape of ``parameter``.
    """
    target = main_grad_of(parameter)
    if target is None:
        return grad.view_as(parameter)
    _add(parameter, target, grad.view_as(target))
    _grad_has_grown(parameter)
    return None


def _add(parameter: Tensor, main_grad: Tensor, grad: Tensor) -> None:
    if begin_accumulation(parameter):
        main_grad.add_(grad)
    else:
        main_grad.copy_(grad)


def _on_accumulated(parameter: Tensor) -> None:
    """Add ``parameter.grad`` to the main gradient if autograd has allocated a separate tensor for it.

    Autograd allocates one if ``parameter.grad`` was None, either because the main gradient has a wider dtype or because
    a user has set ``parameter.grad`` to None.
    """
    grad, main_grad = parameter.grad, main_grad_of(parameter)
    assert main_grad is not None, "the hook is registered by attach_main_grad"
    # Compared by memory: autograd may replace the tensor object and keep the memory.
    if grad is not None and not same_memory(grad, main_grad):
        parameter.grad = None
        _add(parameter, main_grad, grad)
    _grad_has_grown(parameter)


def _grad_has_grown(parameter: Tensor) -> None:
    callback = _state(parameter).on_grad_ready
    if callback is not None:
        callback()
