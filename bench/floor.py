"""Measure the floor of a training step: the time of its GEMMs, each alone and with its fastest kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from internlm.config.schema import ModelConfig
from internlm.ops.cpu import cpu_gemm

ROLES = ("forward", "input gradient", "weight gradient")
REPEATS = 5
Gemm = Callable[[], object]


def linear_layers(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Return input features, output features and the number of linear layers of each shape."""
    hidden, heads, kv = model.hidden_size, model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    inner, layers = model.intermediate_size, model.num_layers
    return [
        (hidden, heads + 2 * kv, layers),
        (heads, hidden, layers),
        (hidden, 2 * inner, layers),
        (inner, hidden, layers),
        (hidden, model.vocab_size, 1),
    ]


def floor_seconds(model: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Time the three GEMMs of every linear layer.

    Args:
        model: Section ``model`` of the config.
        tokens: Tokens of a step.
        dtype: Dtype of the factors; weight gradients are float32.

    Returns:
        Seconds of a step by role, with the fastest kernel for each shape.
    """
    seconds = dict.fromkeys(ROLES, 0.0)
    for inputs, outputs, count in linear_layers(model):
        for role, kernels in _kernels(tokens, inputs, outputs, dtype).items():
            seconds[role] += count * min(_in_turns(kernels))
    return seconds


def _kernels(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, list[Gemm]]:
    """Return the kernels of one linear layer by role, with their operands."""
    x, weight, dy = (
        torch.randn(*shape).to(dtype) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    grad = torch.zeros(outputs, inputs)
    wide = dtype == torch.float32
    products = cpu_gemm.LINEAR.values() if wide else [_mm]
    sums = (cpu_gemm.GRAD_WEIGHT if wide else cpu_gemm.WIDE_GRAD_WEIGHT).values()
    factors = ((x, weight), (dy, weight.t()), (grad, dy, x, True))
    return {
        role: [partial(kernel, *operands) for kernel in kernels]
        for role, kernels, operands in zip(ROLES, (products, products, sums), factors, strict=True)
    }


def _mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def _in_turns(functions: list[Gemm]) -> list[float]:
    """Run functions in turns; return the median seconds of each, without its first run."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(1 + REPEATS):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [median(times[1:]) for times in seconds]
