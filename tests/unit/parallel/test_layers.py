"""Embedding and norms, and gradients that autograd computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from internlm.core.parallel import ParallelEmbedding, ParallelNorm
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.param_state import attach_main_grad, main_grad_of, placed_parameters
from internlm.utils.dtype import default_dtype

IDS = torch.tensor([3, 0, 3, 1])


def embedding(grad_scale: float = 1.0, dtype: torch.dtype = torch.float64) -> ParallelEmbedding:
    with default_dtype(dtype):
        layer = ParallelEmbedding(5, 4, std=1.0, grad_scale=grad_scale)
    initialize_parameters(layer, seed=1)
    return layer


@pytest.mark.parametrize("grad_scale", [1.0, 0.5, 0.1, 3.0])
def test_grad_scale_scales_the_gradient_and_nothing_else(grad_scale: float) -> None:
    plain, scaled = embedding(), embedding(grad_scale)
    dy = torch.randn(4, 4, dtype=torch.float64)
    assert torch.equal(scaled(IDS), F.embedding(IDS, plain.weight))
    plain(IDS).backward(dy)
    scaled(IDS).backward(dy)
    assert torch.allclose(scaled.weight.grad, grad_scale * plain.weight.grad, rtol=1e-12)


def test_gradients_of_a_repeated_token_add_up() -> None:
    layer = embedding()
    layer(IDS).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [1, 1, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_autograds_gradients_are_added_to_main_grad_too(dtype: torch.dtype) -> None:
    layer = embedding(dtype=dtype)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    attach_main_grad(layer.weight, torch.full_like(layer.weight, 256.0, dtype=wide))
    buffer = main_grad_of(layer.weight)
    for _ in range(2):
        layer(IDS).sum().backward()
    assert main_grad_of(layer.weight) is buffer
    assert buffer[:, 0].tolist() == [258, 258, 256, 260, 256]


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_norms(norm_type: str) -> None:
    with default_dtype(torch.float64):
        norm = ParallelNorm(6, norm_type, eps=1e-5)
        x = torch.randn(3, 6)
    initialize_parameters(norm, seed=1)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
    if norm_type == "rmsnorm":
        assert norm.bias is None
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    else:
        with torch.no_grad():
            norm.bias.copy_(torch.linspace(-1, 1, 6))
        expected = F.layer_norm(x, (6,), norm.weight, norm.bias, 1e-5)
    assert torch.allclose(norm(x), expected, rtol=1e-12)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_norms_start_as_the_identity_and_are_no_matrices(norm_type: str) -> None:
    norm = ParallelNorm(6, norm_type, eps=1e-5)
    initialize_parameters(norm, seed=1)
    assert norm.weight.tolist() == [1.0] * 6
    assert norm.bias is None or norm.bias.tolist() == [0.0] * 6
    assert not any(placement.is_matrix for _, _, placement in placed_parameters(norm))
