"""Measure the floor of a training step: the time of its matrix products, each alone, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from internlm.config.schema import ModelConfig
from internlm.ops import gemm

REPEATS = 5
Gemm = Callable[[], object]


def products(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Return input features, output features and number of layers of every kind of linear layer."""
    hidden, heads, kv = model.hidden_size, model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    inner, layers = model.intermediate_size, model.num_layers
    return [
        (hidden, heads + 2 * kv, layers),
        (heads, hidden, layers),
        (hidden, 2 * inner, layers),
        (inner, hidden, layers),
        (hidden, model.vocab_size, 1),
    ]


def floor_seconds(model: ModelConfig, tokens: int, plain: bool) -> float:
    """Measure the three products of every linear layer; return the sum of their median seconds.

    Args:
        model: the ``model`` section.
        tokens: tokens of a step.
        plain: use ``torch.mm``, as a model in plain torch does, rather than :mod:`internlm.ops.gemm`.
    """
    return sum(
        count * sum(map(_seconds, _three(tokens, inputs, outputs, plain))) for inputs, outputs, count in products(model)
    )


def _three(tokens: int, inputs: int, outputs: int, plain: bool) -> list[Gemm]:
    """Return the products for the output, the gradient of the input and the gradient of the weight."""
    x, weight, dy = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    grad = torch.zeros(outputs, inputs)
    if plain:
        return [lambda: torch.mm(x, weight.t()), lambda: torch.mm(dy, weight), lambda: torch.mm(dy.t(), x, out=grad)]
    return [
        lambda: gemm.linear(x, weight),
        lambda: gemm.grad_input(dy, weight),
        lambda: gemm.accumulate_grad_weight(grad, dy, x),
    ]


def _seconds(product: Gemm) -> float:
    product()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return median(times)


def gemm_flops_per_second(plain: bool) -> float:
    """Measure the machine's fp32 rate by a product of [2048, 2048] matrices."""
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b.t()) if plain else gemm.linear(a, b))
