from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from internlm.ops import layer_norm, reference, rms_norm
from tests.unit.ops.parity import assert_parity, randn, saved_for_backward

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (33, 48), (7, 4, 16)])
def test_rms_norm_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    assert_parity(partial(rms_norm, eps=1e-5), partial(reference.rms_norm, eps=1e-5), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_reference(bias: bool, dtype: torch.dtype) -> None:
    parameters = [randn(48, dtype=dtype, seed=i) for i in range(1, 3 if bias else 2)]

    def with_optional_bias(op, x, weight, bias=None):
        return op(x, weight, bias, 1e-5)

    ours, exact = (partial(with_optional_bias, op) for op in (layer_norm, reference.layer_norm))
    assert_parity(ours, exact, randn(33, 48, dtype=dtype), *parameters)


def test_rms_norm_gradient() -> None:
    assert gradcheck(partial(rms_norm, eps=1e-3), (randn(3, 5), randn(5, seed=1)))


def test_rms_norm_of_zeros_is_zero_and_so_is_not_its_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-4)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8))
    torch.testing.assert_close(x.grad, torch.full((2, 8), 100.0))


def test_rms_norm_in_half_precision_does_not_overflow() -> None:
    x = torch.full((2, 512), 300.0, dtype=torch.float16)  # the sum of squares is beyond what fp16 holds
    torch.testing.assert_close(rms_norm(x, torch.ones(512, dtype=torch.float16), 1e-5), torch.ones_like(x))


def test_rms_norm_saves_its_input_and_a_number_per_token() -> None:
    x, weight = randn(64, 128), randn(128, seed=1)
    with saved_for_backward() as saved:
        rms_norm(x, weight, 1e-5)
    assert sorted(t.numel() for t in saved) == [64, 128, 64 * 128]
