"""Adapters: what they compute, what is trained, and what a run with them needs of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.config.schema import AdamConfig, HybridZeroConfig
from internlm.core.parallel.lora import is_adapter, merged
from internlm.core.parallel.param_state import main_grad_of
from internlm.model.decoder import Decoder
from internlm.solver.optimizer import HybridZeroOptimizer
from tests.unit.config.samples import problems_of
from tests.unit.model.samples import decoder, tokens

LORA: dict[str, Any] = {"lora": {"rank": 3, "alpha": 6.0}, "num_kv_attention_heads": 2, "qkv_bias": True}
UNFUSED = {"enable_qkv_fusion": False, "mlp_layer_fusion": False}
TARGETS = ("wqkv", "wo", "w13", "w2")


def adapted(dtype: torch.dtype = torch.float64, **keys: Any) -> Decoder:
    """A decoder whose adapters are not zero any more."""
    model = decoder(dtype=dtype, **{**LORA, **keys})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_at_first_the_model_is_the_one_without_adapters() -> None:
    ids = tokens(2, 24)
    assert torch.equal(decoder(**LORA)(ids), decoder(**{**LORA, "lora": None})(ids))


@pytest.mark.parametrize("keys", [{}, {"checkpoint": True}, {"checkpoint": 0.5, "cpu_offloading": 1}, UNFUSED], ids=str)
def test_logits_and_gradients_are_those_of_merged_weights(keys: dict[str, Any]) -> None:
    model, plain = (
        adapted(**keys),
        decoder(**{**LORA, **{key: keys[key] for key in UNFUSED if key in keys}, "lora": None}),
    )
    weights = dict(model.named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in weights.items() if is_adapter(name)}
    whole = {name: p.detach() for name, p in weights.items() if not is_adapter(name)}
    for name, weight in whole.items():
        prefix = name.removesuffix(".weight")
        if f"{prefix}.lora_a.weight" in leaves:
            a, b = (leaves[f"{prefix}.lora_{half}.weight"] for half in "ab")
            whole[name] = merged(weight, a, b, scale=2.0)
    ids, labels = tokens(2, 24), tokens(2, 24, seed=4)
    expected = torch.func.functional_call(plain, whole, (ids,))
    assert (model(ids) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (expected - plain(ids)).abs().max() > 0.1
    torch.func.functional_call(plain, whole, (ids,), {"labels": labels}).loss_sum.backward()
    model(ids, labels=labels).loss_sum.backward()
    for name, leaf in leaves.items():
        assert (weights[name].grad - leaf.grad).norm() <= 1e-11 * leaf.grad.norm(), name


@pytest.mark.parametrize("targets", [TARGETS, ("wqkv",), ("wo", "w2")], ids=str)
def test_only_adapters_are_trained_and_only_they_have_gradient_buffers(targets: tuple[str, ...]) -> None:
    model = decoder(**{**LORA, "lora": {"rank": 3, "targets": targets}})
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=0.1), HybridZeroConfig(clip_grad_norm=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.begin_step(1)
        model(tokens(2, 24), labels=tokens(2, 24, seed=4)).loss_sum.backward()
        optimizer.step(lr=0.1, beta2=0.95)
    for name, parameter in model.named_parameters():
        assert (main_grad_of(parameter) is not None) == is_adapter(name), name
        assert torch.equal(parameter, before[name]) != is_adapter(name), name
        assert not is_adapter(name) or name.rsplit(".", 3)[-3] in targets


def test_merging_rounds_once() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((4, 2, 8), (3, 8), (4, 2, 3)))
    exact: Tensor = weight.double() + 0.5 * torch.einsum("ijr,rk->ijk", b.double(), a.double())
    assert torch.allclose(merged(weight, a, b, 0.5).double(), exact, rtol=1e-6, atol=1e-6)
    half = merged(weight.bfloat16(), a, b, 0.5)
    wide = weight.bfloat16().float() + 0.5 * torch.einsum("ijr,rk->ijk", b, a)
    assert torch.equal(half, wide.bfloat16())


def test_attention_is_not_computed_twice() -> None:
    changes = {"model.lora": {"rank": 3}, "model.checkpoint": "selective"}
    (problem,) = problems_of(changes)
    assert problem.startswith("model.checkpoint: 'selective' recomputes attention for wo, and again for its adapter")
    assert problems_of({**changes, "model.lora": {"rank": 3, "targets": ("wqkv",)}}) == []
