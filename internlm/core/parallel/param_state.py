"""Gradients are added straight into the optimizer's flat buffer.

The optimizer gives each parameter a ``main_grad``: a view of its flat gradient buffer, of the parameter's shape,
perhaps of a wider type. Layers that compute a weight gradient themselves add it there and return None to autograd;
where there is no ``main_grad`` (a model used without our optimizer) they return the gradient as any module does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.ops import gemm
from internlm.utils.dtype import grad_dtype


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """Where the gradient of ``parameter`` is to be added, if the optimizer said so."""
    return getattr(parameter, "main_grad", None)


def wait_for_all_gather(parameter: Tensor) -> Tensor:
    """``parameter``, with the values of its last update: some may still have to come from other ranks. A forward pass
    that calls the module which has it need not ask."""
    ask = getattr(parameter, "before_use", None)
    if ask is not None:
        ask()
    return parameter


def add_weight_grad(parameter: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Add dyᵀ·x to the gradient of ``parameter``; dy: [T, O], x: [T, I]. The gradient itself where there is no
    ``main_grad``."""
    target = main_grad_of(parameter)
    if target is None:
        return weight_grad(dy, x, grad_dtype(parameter)).view_as(parameter)
    gemm.accumulate_grad_weight(target.view(dy.shape[1], x.shape[1]), dy, x)
    _tell(parameter)
    return None


def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dyᵀ·x as a tensor of its own: [O, I], of ``dtype`` if that is given."""
    grad = dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
    gemm.accumulate_grad_weight(grad, dy, x, accumulate=False)
    return grad


def add_grad(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """Add ``grad`` to the gradient of ``parameter``; ``grad`` itself where there is no ``main_grad``."""
    target = main_grad_of(parameter)
    if target is None:
        return grad.view_as(parameter)
    target.add_(grad.view_as(target))
    _tell(parameter)
    return None


def attach_main_grad(parameter: nn.Parameter, main_grad: Tensor) -> None:
    """Make ``main_grad`` the place where gradients of ``parameter`` are added, by our layers and by autograd alike."""
    parameter.main_grad = main_grad  # type: ignore[attr-defined]
    if main_grad.dtype == parameter.dtype:
        parameter.grad = main_grad  # autograd adds in place to a gradient that is there
    parameter.register_post_accumulate_grad_hook(_move_grad)


def _move_grad(parameter: Tensor) -> None:
    """Autograd made a gradient of its own, for want of one to add to: the buffer is of a wider type, or somebody set
    ``.grad`` to None. Add it to the buffer."""
    grad, main_grad = parameter.grad, parameter.main_grad  # type: ignore[attr-defined]
    if grad is not None and grad.data_ptr() != main_grad.data_ptr():
        main_grad.add_(grad)
        parameter.grad = main_grad if main_grad.dtype == parameter.dtype else None
    _tell(parameter)


def _tell(parameter: Tensor) -> None:
    """Whoever wants to know when the gradient of ``parameter`` has grown."""
    listener = getattr(parameter, "on_grad", None)
    if listener is not None:
        listener()
