"""The floor of a step: each of its matrix products timed alone, one after another, in this very process."""

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
    """(in features, out features, how often in the model) of every linear layer."""
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
    """Seconds of the forward product and the two backward ones of every linear layer, by median.

    ``plain``: by ``torch.mm``, as a model written in plain torch computes them; else by our own
    :mod:`internlm.ops.gemm`.
    """
    return sum(
        count * sum(map(_seconds, _three(tokens, inputs, outputs, plain))) for inputs, outputs, count in products(model)
    )


def _three(tokens: int, inputs: int, outputs: int, plain: bool) -> list[Gemm]:
    """Output, gradient of the input, gradient of the weight."""
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
    """The machine's own float32 rate: a product of [2048, 2048] matrices."""
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b.t()) if plain else gemm.linear(a, b))
