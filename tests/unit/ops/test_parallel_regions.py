"""On several threads, an op has few parallel regions: each waits for its slowest thread on a busy machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.ops import gated, rms_norm, rotary_table, split_qkv_rotary
from tests.unit.ops.parity import randn

GRAIN = 2**15  # elements from which torch divides an operator among threads
TABLE = rotary_table(torch.arange(2048), 64, dtype=torch.float32)
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], int]] = {
    # op, shape of its input, regions of forward and backward together
    "gated": (gated, (512, 2, 1408), 2 + 4),
    "rotary": (lambda x: split_qkv_rotary(x, *TABLE, False), (2048, 2, 4, 64), 9 + 10),
    "rms_norm": (lambda x: rms_norm(x, torch.ones(512), 1e-5), (512, 512), 3 + 3),
}


class _Regions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        allocates = func in (torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)
        self.count += isinstance(first, Tensor) and first.numel() >= GRAIN and not is_view and not allocates
        return out


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(op: Callable[..., Any], x: Tensor, threads: int) -> tuple[list[Tensor], int]:
    with _threads(threads), _Regions() as regions:
        out = op(x)
        outs = list(out) if isinstance(out, tuple) else [out]
        grads = torch.autograd.grad(outs, x, outs)
    return [*outs, *grads], regions.count


@pytest.mark.parametrize("name", CASES)
def test_on_several_threads_an_op_has_few_parallel_regions_and_the_same_result(name: str) -> None:
    op, shape, regions = CASES[name]
    x = randn(*shape, dtype=torch.float32)
    (alone, _), (together, count) = _run(op, x, threads=1), _run(op, x, threads=2)
    assert count <= regions
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
