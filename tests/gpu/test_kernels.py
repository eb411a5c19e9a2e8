"""Kernels of a GPU against exact results; the rows for the CPU show that the tests themselves are right."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from internlm.core.parallel.dropout import keep_mask
from internlm.ops import PackedSequences, attention, gemm, why_unavailable
from internlm.utils.errors import ConfigError
from tests.harness.gpu_table import on_cpu_and_gpu

LENGTHS = [3, 64, 17, 200, 1]
FLASH, VARLEN = "attention by flash-attn", "attention by `torch.nn.attention.varlen`"
SDPA = "attention by scaled-dot-product attention"
ROW_OF_BACKEND = {"flash": FLASH, "varlen": VARLEN, "sdpa": SDPA}
BACKENDS = [pytest.param(name, marks=pytest.mark.gpu(row)) for name, row in ROW_OF_BACKEND.items()]
#: Relative error of a kernel, in the L2 norm.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3, torch.float64: 1e-10}


def relative_error(value: Tensor, exact: Tensor) -> float:
    difference = value.detach().double() - exact.detach()
    return (difference.norm() / exact.detach().norm()).item()


def assert_equals_reference(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, backend: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    sequences = PackedSequences.from_cu_seqlens(cu_seqlens)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    ours = attention(*inputs, sequences, backend=backend)
    exact = attention(*doubles, sequences, backend="reference")
    grad = torch.randn(ours.shape, device=device, generator=generator).to(dtype)
    grads = torch.autograd.grad(ours, inputs, grad)
    exact_grads = torch.autograd.grad(exact, doubles, grad.double())
    assert ours.dtype == dtype
    for value, wanted in zip([ours, *grads], [exact, *exact_grads], strict=True):
        assert relative_error(value, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("kv_heads", [8, 2])
@on_cpu_and_gpu(SDPA)
def test_the_attention_of_a_run_equals_the_reference(kv_heads: int, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    total = sum(LENGTHS)
    assert_equals_reference([(total, 8, 64), (total, kv_heads, 64), (total, kv_heads, 64)], dtype, device, "auto")


@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
@pytest.mark.parametrize("head_dim", [8, 60, 128, 256, 320])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@on_cpu_and_gpu("limits of attention kernels")
def test_an_attention_kernel_refuses_what_it_cannot_compute_and_computes_the_rest(
    backend: str, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    total = sum(LENGTHS)
    shapes = [(total, 4, head_dim), (total, 2, head_dim), (total, 2, head_dim)]
    reason = why_unavailable(backend, device, dtype, head_dim)
    if "needs the package" in reason:
        pytest.skip(reason)
    if not reason:
        assert_equals_reference(shapes, dtype, device, backend)
        return
    sequences = PackedSequences.uniform(1, total, device)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        attention(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes), sequences, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_equals_the_reference(backend: str, kv_heads: int) -> None:
    if reason := why_unavailable(backend, "cuda", torch.bfloat16, 64):
        pytest.skip(reason)
    total = sum(LENGTHS)
    shapes = [(total, 8, 64), (total, kv_heads, 64), (total, kv_heads, 64)]
    assert_equals_reference(shapes, torch.bfloat16, "cuda", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_backward_is_deterministic_if_asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_unavailable(backend, "cuda", torch.bfloat16, 64):
        pytest.skip(reason)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sequences = PackedSequences.uniform(2, 4096, "cuda")
    inputs = [
        torch.randn(8192, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    ]
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            found.append(torch.autograd.grad(attention(*inputs, sequences, backend=backend).square().sum(), inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(again, found[0], strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@on_cpu_and_gpu("GEMMs")
def test_output_and_input_gradient_of_a_linear_are_products(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    shapes = (300, 292), (101, 292), (300, 101)
    x, weight, dy = (torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes)
    y, dx = gemm.linear(x, weight), gemm.grad_input(dy, weight)
    assert relative_error(y, x.double() @ weight.double().t()) < TOLERANCE[dtype]
    assert relative_error(dx, dy.double() @ weight.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [True, False])
@on_cpu_and_gpu("GEMMs")
def test_weight_gradient_is_added_in_float32(dtype: torch.dtype, accumulate: bool, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(1000, size, device=device, generator=generator).to(dtype) for size in (292, 1001))
    out = torch.randn(1001 * 292 + 1, device=device, generator=generator)[1:].view(1001, 292)  # not aligned
    exact = dy.double().t() @ x.double() + (out.double() if accumulate else 0)
    gemm.accumulate_grad_weight(out, dy, x, accumulate)
    assert relative_error(out, exact) < 1e-5


@pytest.mark.gpu("random streams of the device")
def test_dropout_masks_are_those_of_the_cpu() -> None:
    masks = [keep_mask(2**63 - 5, range(7, 1007), 1001, 6554, torch.device(device)) for device in ("cuda", "cpu")]
    assert torch.equal(masks[0].cpu(), masks[1])
