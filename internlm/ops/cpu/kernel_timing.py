"""Measurement of the CPU kernels from which the table chooses: about a second, once for each type of processor.

All kernels of a case run in turns on one thread, and each counts with its shortest CPU time. CPU time and turns make
the result the same on a busy machine. Where two kernels are nearly as fast, the rule decides, so that two machines of
one type agree. The rule also decides the cases that are left when :data:`LIMIT` has passed.

Shapes: T tokens, I input features, O output features; L tokens of a sequence, N heads, D head dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.ops.cpu import cpu_gemm
from internlm.ops.cpu.blocked_attention import EqualLengthRun, blocked_attention
from internlm.ops.cpu.kernel_choice import CASES, KERNELS, Case, Table, may_collapse

Run = Callable[[], object]

#: Another kernel than the rule's must take less than this share of its time.
_MARGIN = 0.93
_REPEATS, _SECONDS = 6, 0.4  # of a case: repeats, and the time after which none begins
#: Seconds after which no further repeat begins, all cases together.
LIMIT = 2.0
_TOKENS, _SHAPES = 1024, ((512, 1408), (1408, 512))  # T; I and O of the GEMMs whose times are summed
_LENGTH, _HEADS, _DIM = 512, 8, 64  # L, N and D of attention
_SMALL = 256  # rows and columns of the products that show whether bfloat16 is emulated


def measure(fallback: Table, dtype: torch.dtype) -> Table:
    """Choose the kernels of the large cases that a run in ``dtype`` has, by measurement.

    Args:
        fallback: Table of the rule, which decides where the difference is small.
        dtype: Dtype of the run's parameters.

    Returns:
        The measured cases; without those that were left when :data:`LIMIT` had passed.
    """
    name = str(dtype).removeprefix("torch.")
    chosen: dict[Case, str] = {}
    end = time.perf_counter() + LIMIT
    with _one_thread():
        for operation, case_dtype in KERNELS:
            if case_dtype != name:
                continue
            runs = _runs(operation, dtype)
            times = shortest(list(runs.values()), end)
            if times is None:
                break
            seconds = dict(zip(runs, times, strict=True))
            # A GEMM is one parallel region whatever its kernel, so the result holds for several threads too. Of
            # attention it does not: see ``COLLAPSING``.
            for case in CASES:
                if case[:2] == (operation, name) and case.large and not may_collapse(case):
                    chosen[case] = _preferred(fallback[case], seconds)
    return chosen


def bf16_slowdown() -> float:
    """Measure the time of a product in bfloat16, relative to one in float32."""
    factors = [torch.ones(_SMALL, _SMALL, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    with _one_thread():
        times = shortest([partial(torch.mm, factor, factor) for factor in factors])
    assert times is not None, "there is no limit"
    return times[1] / times[0]


def shortest(runs: list[Run], end: float = inf) -> list[float] | None:
    """Run functions in turns, and return the shortest CPU time of each in seconds, without its first run.

    Args:
        runs: Functions to time.
        end: Value of ``time.perf_counter`` from which on no run begins.

    Returns:
        Seconds by function; None if ``end`` came before each had run twice.
    """
    best, start = [inf] * len(runs), time.perf_counter()
    for repeat in range(-1, _REPEATS):
        for index, run in enumerate(runs):
            now = time.perf_counter()
            if now > end:
                return best if repeat > 0 else None
            before = time.thread_time()
            run()
            if repeat >= 0:  # in its first run oneDNN compiles a kernel
                best[index] = min(best[index], time.thread_time() - before)
        if repeat > 0 and time.perf_counter() - start > _SECONDS:
            break
    return best


def _preferred(default: str, seconds: dict[str, float]) -> str:
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < _MARGIN * seconds[default] else default


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- what runs --------------------------------------------------------------------------------------------------------
def _runs(operation: str, dtype: torch.dtype) -> dict[str, Run]:
    """Return a function for each kernel of an operation, with inputs of the measured shapes."""
    if operation == "attention":
        q, k, v = (_random(_HEADS, _LENGTH, _DIM).transpose(0, 1).requires_grad_() for _ in range(3))  # [L, N, D]
        return {name: partial(_forward_backward, kernel, q, k, v) for name, kernel in _ATTENTION.items()}
    operands = [
        (_random(_TOKENS, inputs, dtype=dtype), _random(outputs, inputs, dtype=dtype), _random(_TOKENS, outputs))
        for inputs, outputs in _SHAPES
    ]  # x, weight, dy
    if operation == "grad_weight":
        grad_kernels = cpu_gemm.GRAD_WEIGHT if dtype == torch.float32 else cpu_gemm.WIDE_GRAD_WEIGHT
        weights = [(torch.zeros(weight.shape), dy.to(dtype), x, True) for x, weight, dy in operands]
        return {name: partial(_all, kernel, weights) for name, kernel in grad_kernels.items()}
    factors = [(x, weight) if operation == "linear" else (dy, weight.t()) for x, weight, dy in operands]
    return {name: partial(_all, kernel, factors) for name, kernel in cpu_gemm.LINEAR.items()}


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # A generator of its own: a measurement must not advance the run's.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _all(kernel: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> None:
    for operands in arguments:
        kernel(*operands)


def _forward_backward(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    out = kernel(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def _blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return blocked_attention(q, k, v, (EqualLengthRun(0, 1, _LENGTH),), _DIM**-0.5, None)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key, value = (x[None].transpose(1, 2) for x in (q, k, v))  # [1, N, L, D]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)[0]


_ATTENTION = {"blocked": _blocked, "sdpa": _sdpa}
