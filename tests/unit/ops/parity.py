"""Compare an op with its reference, forward and backward, and watch what it allocates and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

#: Rounding errors that a sum of terms of normal size may have, in units of the last place of the type that it is taken
#: in. An exact result may be zero (the gradient of a query that sees one key), and whether the terms cancel to the last
#: bit depends on the processor: the error is then relative to nothing.
ROUNDING_ULPS = 8

Op = Callable[..., Any]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_parity(ours: Op, reference: Op, *inputs: Tensor) -> None:
    """Assert that outputs and gradients agree with those of ``reference`` in fp64, as far as the inputs' dtype goes.

    The norm of a difference may be :data:`TOLERANCE` of that of the exact tensor, or :data:`ROUNDING_ULPS` of the terms
    that it is summed from, whichever is more. The terms are of the size of the inputs for outputs, and of the incoming
    gradients for gradients.
    """
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    outs, exact_outs = _tuple(ours(*inputs)), _tuple(reference(*exact_inputs))
    douts = [randn(*out.shape, dtype=out.dtype, seed=i).detach() for i, out in enumerate(outs)]
    grads = torch.autograd.grad(outs, inputs, douts)
    exact_grads = torch.autograd.grad(exact_outs, exact_inputs, [d.double() for d in douts])
    _assert_close("output", outs, exact_outs, exact_inputs, inputs[0].dtype)
    _assert_close("gradient", grads, exact_grads, douts, inputs[0].dtype)


def _assert_close(
    name: str, values: Sequence[Tensor], exacts: Sequence[Tensor], terms: Sequence[Tensor], dtype: torch.dtype
) -> None:
    # Half precision is summed in fp32, so its own unit would allow far too much.
    ulp = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = ROUNDING_ULPS * ulp * max(term.detach().double().norm().item() for term in terms)
    for i, (value, exact) in enumerate(zip(values, exacts, strict=True)):
        assert value.shape == exact.shape
        difference = (value.detach().double() - exact.detach()).norm().item()
        limit = max(TOLERANCE[dtype] * exact.detach().norm().item(), rounding)
        assert difference < limit, f"{name} {i}: off by {difference:.2g}, allowed {limit:.2g}"


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
