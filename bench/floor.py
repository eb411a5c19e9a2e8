"""Measure the floor of a training step: its GEMMs and attention, each alone and with its fastest kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench.yardsticks import Yardstick
from internlm import ops
from internlm.config.schema import ModelConfig
from internlm.ops.cpu import cpu_gemm
from internlm.ops.cpu.kernel_choice import KERNELS

ROLES = ("forward", "input gradient", "weight gradient")
ATTENTION = "attention"


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


class Part(NamedTuple):
    """Part of a step that is timed alone: kernels that compute the same, and how many times a step has it."""

    role: str
    count: int
    kernels: list[Callable[[], object]]


class Floor:
    """Times of the GEMMs and of attention of a step, taken turn by turn.

    Args:
        model: Section ``model`` of the config.
        yardstick: Batches of the step.
        dtype: Dtype of the factors; weight gradients are float32.
    """

    def __init__(self, model: ModelConfig, yardstick: Yardstick, dtype: torch.dtype) -> None:
        self._parts = [
            Part(role, count, kernels)
            for inputs, outputs, count in linear_layers(model)
            for role, kernels in _gemms(yardstick.tokens, inputs, outputs, dtype).items()
        ]
        self._parts.append(Part(ATTENTION, model.num_layers, list(_attention(model, yardstick, dtype))))
        self._seconds: list[list[list[float]]] = [[[] for _ in part.kernels] for part in self._parts]

    def turn(self) -> None:
        """Run and time each kernel once."""
        for part, by_kernel in zip(self._parts, self._seconds, strict=True):
            for kernel, seconds in zip(part.kernels, by_kernel, strict=True):
                start = time.perf_counter()
                kernel()
                seconds.append(time.perf_counter() - start)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step by role: medians of all turns but the first, of the fastest kernels."""
        total = dict.fromkeys((*ROLES, ATTENTION), 0.0)
        for part, by_kernel in zip(self._parts, self._seconds, strict=True):
            total[part.role] += part.count * min(median(seconds[1:]) for seconds in by_kernel)
        return total


def _gemms(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, list[Callable[[], object]]]:
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


def _attention(model: ModelConfig, yardstick: Yardstick, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yield the kernels of attention, forward and backward, in float32 each of the table's."""
    _, lengths = next(yardstick.batches())
    sequences = ops.PackedSequences.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))
    sizes = (model.num_attention_heads, model.kv_heads, model.kv_heads)
    # Stored by head, as the rotary embedding leaves them.
    heads = [torch.randn(n, yardstick.tokens, model.head_size).to(dtype).transpose(0, 1) for n in sizes]
    inputs = [x.requires_grad_() for x in heads]
    dout = torch.randn(inputs[0].shape).to(dtype)
    for backend in KERNELS.get(("attention", str(dtype).removeprefix("torch.")), ("sdpa",)):
        attend = partial(ops.attention, *inputs, sequences, backend=backend)
        yield lambda attend=attend: torch.autograd.grad(attend(), inputs, dout)
