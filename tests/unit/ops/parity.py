"""Compare an op with its reference, forward and backward, and watch what it allocates and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Op = Callable[..., Any]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_parity(ours: Op, reference: Op, *inputs: Tensor) -> None:
    """Outputs and gradients agree with those of ``reference`` in fp64, as far as the dtype of the inputs goes."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    outs, exact_outs = _tuple(ours(*inputs)), _tuple(reference(*exact_inputs))
    douts = [randn(*out.shape, dtype=out.dtype, seed=i).detach() for i, out in enumerate(outs)]
    grads = torch.autograd.grad(outs, inputs, douts)
    exact_grads = torch.autograd.grad(exact_outs, exact_inputs, [d.double() for d in douts])
    tolerance = TOLERANCE[inputs[0].dtype]
    for name, values, exacts in (("output", outs, exact_outs), ("gradient", grads, exact_grads)):
        for i, (value, exact) in enumerate(zip(values, exacts, strict=True)):
            assert value.shape == exact.shape
            assert relative_error(value, exact) < tolerance, f"{name} {i}"


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``."""
    difference = value.detach().double() - exact.detach().double()
    return (difference.norm() / exact.detach().double().norm().clamp(min=1e-30)).item()


class LargestTensor(TorchDispatchMode):
    """Within it, ``elements`` is the size of the largest tensor that any operation has allocated."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, leaf.numel())
        return out


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves within."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def _tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)
