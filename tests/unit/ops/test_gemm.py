from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internlm.ops import gemm
from internlm.ops.cpu import cpu_gemm
from tests.unit.ops.parity import TOLERANCE, randn, relative_error

SHAPES = [
    (256, 64, 192),
    (200, 96, 320),
    (2, 512, 2048),
    (1, 512, 1024),
    (1, 3, 2),
    (70, 512, 64),
    (4096, 64, 64),
]  # T, I, O
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed).detach()


@pytest.fixture
def onednn_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes (M, K, N) of the products that go through oneDNN."""
    shapes: list[tuple[int, ...]] = []
    genuine = cpu_gemm._onednn

    def recording(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((*a.shape, b.shape[0]))
        return genuine(a, b)

    monkeypatch.setattr(cpu_gemm, "_onednn", recording)
    return shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_products_of_a_linear_layer(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, dy = values(tokens, inputs, dtype=dtype), values(tokens, outputs, dtype=dtype, seed=1)
    weight, out = values(outputs, inputs, dtype=dtype, seed=2), values(outputs, inputs, dtype=dtype, seed=3)
    exact = out.double() + dy.double().t() @ x.double()
    gemm.accumulate_grad_weight(out, dy, x)
    tolerance = TOLERANCE[dtype]
    assert relative_error(gemm.linear(x, weight), x.double() @ weight.double().t()) < tolerance
    assert relative_error(gemm.grad_input(dy, weight), dy.double() @ weight.double()) < tolerance
    assert relative_error(out, exact) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4, 300, 3000])
def test_weight_gradient_without_accumulation_overwrites(tokens: int, dtype: torch.dtype) -> None:
    x, dy = values(tokens, 64, dtype=dtype), values(tokens, 96, dtype=dtype, seed=1)
    out = torch.full((96, 64), float("nan"), dtype=dtype)
    gemm.accumulate_grad_weight(out, dy, x, accumulate=False)
    assert relative_error(out, dy.double().t() @ x.double()) < TOLERANCE[dtype]
    assert torch.equal(gemm.grad_weight(dy, x), out)
    assert gemm.grad_weight(dy, x).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_in_a_wider_buffer_is_not_rounded_to_half(dtype: torch.dtype) -> None:
    x, dy = values(100, 32, dtype=dtype), values(100, 48, dtype=dtype, seed=1)
    out = torch.zeros(48, 32)
    gemm.accumulate_grad_weight(out, dy, x)
    assert relative_error(out, dy.double().t() @ x.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_of_matrices_and_of_batches(transposed: bool) -> None:
    a, b = values(3, 192, 128), values(3, 128, 256, seed=1)
    if transposed:
        a = a.mT.contiguous().mT
    assert relative_error(cpu_gemm.matmul(a, b), a.double() @ b.double()) < TOLERANCE[torch.float32]
    assert relative_error(cpu_gemm.matmul(a[0], b[0]), a[0].double() @ b[0].double()) < TOLERANCE[torch.float32]


def test_weights_with_gaps_between_their_rows() -> None:
    x, fused = values(256, 64), values(512, 3 * 64, seed=1)
    weight = fused[:, 64:128]
    assert relative_error(gemm.linear(x, weight), x.double() @ weight.double().t()) < TOLERANCE[torch.float32]


@needs_onednn
def test_large_products_in_fp32_go_through_onednn(
    onednn_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = values(256, 64), values(192, 64)
    gemm.linear(x, weight)
    assert onednn_shapes == [(256, 64, 192)]
    gemm.linear(x[:8], weight)  # too little work
    gemm.linear(x.double(), weight.double())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    gemm.linear(x, weight)
    assert len(onednn_shapes) == 1


@needs_onednn
def test_any_number_of_tokens_needs_few_kernels(onednn_shapes: list[tuple[int, ...]]) -> None:
    weight, out = values(192, 128), torch.zeros(192, 128)
    for tokens in range(65, 257, 7):
        x, dy = values(tokens, 128), values(tokens, 192)
        assert gemm.linear(x, weight).shape == (tokens, 192)
        assert gemm.grad_input(dy, weight).shape == (tokens, 128)
        gemm.accumulate_grad_weight(out, dy, x)
    assert len(onednn_shapes) > 70
    assert len(set(onednn_shapes)) <= 3 * 3  # three products of 128, 192 and 256 tokens


def test_the_same_product_twice_is_the_same_to_the_last_bit() -> None:
    x, weight, dy = values(300, 256), values(512, 256, seed=1), values(300, 512, seed=2)
    gradients = torch.zeros(2, 512, 256)
    for out in gradients:
        gemm.accumulate_grad_weight(out, dy, x)
    assert torch.equal(gemm.linear(x, weight), gemm.linear(x.clone(), weight.clone()))
    assert torch.equal(gemm.grad_input(dy, weight), gemm.grad_input(dy.clone(), weight.clone()))
    assert torch.equal(*gradients)
