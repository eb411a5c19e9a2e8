"""Families without a model in ``transformers``, and switches of the residual stream, against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from internlm.config.schema import ModelConfig
from internlm.core.parallel.initialization import initialize_parameters
from internlm.model.families import FAMILIES, FamilyBuilder
from tests.unit.model.plain import plain_logits
from tests.unit.model.samples import SMALL, decoder, gradients, tokens

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "INTERNLM": ("INTERNLM", {}),
    "INTERNLM2": ("INTERNLM2", {"num_kv_attention_heads": 2}),
    "INTERNLM2, one kv head, wide heads": ("INTERNLM2", {"num_kv_attention_heads": 1, "head_dim": 12}),
    "BAICHUAN2": ("BAICHUAN2", {}),
    "norms after the sums": ("INTERNLM2", {"apply_post_layer_norm": True, "num_kv_attention_heads": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str) -> None:
    family, keys = CASES[case]
    model = decoder(family, **keys)
    ids, labels = tokens(2, 24), tokens(2, 24, seed=4)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = plain_logits(model.spec.config, weights, ids)
    assert expected.abs().max() > 0.5
    assert (model(ids) - expected).abs().max() <= 1e-12 * expected.abs().max()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    model(ids, labels=labels, grad_scale=1 / labels.numel()).loss_sum.backward()
    for name, grad in gradients(model).items():
        assert (grad - weights[name].grad).norm() <= 1e-11 * grad.norm(), name


@pytest.mark.parametrize("family", ["INTERNLM2", "OLMO2"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_a_residual_stream_in_float32_is_nearer_to_the_exact_result(family: str, post_norm: bool) -> None:
    # Many small terms: their sum is what bfloat16 rounds most.
    small = dict.fromkeys(("attn_other_init_std", "ffn_other_init_std", "attn_wqkv_init_std"), 0.05)
    keys = {"num_layers": 24, "apply_post_layer_norm": post_norm, **small}
    ids = tokens(2, 24)
    exact = decoder(family, torch.float64, **keys)
    narrow, wide = (decoder(family, torch.bfloat16, residual_in_fp32=value, **keys) for value in (False, True))
    with torch.no_grad():
        for model in (exact, narrow, wide):
            for parameter, source in zip(model.parameters(), narrow.parameters(), strict=True):
                parameter.copy_(source)
        errors = [(model(ids).double() - exact(ids)).norm().item() for model in (narrow, wide)]
    # Norms after the sums leave less to gain: what they round is what the next layer reads anyway.
    assert errors[1] < (1 if post_norm else 0.8) * errors[0]
    hidden, dtype = wide.hidden_like({"input_ids": ids})
    assert (hidden, dtype) == ((48, 32), torch.float32)


def test_internlm_draws_its_published_initial_values() -> None:
    keys = {key: value for key, value in SMALL.items() if not key.endswith("_init_std") and key != "use_scaled_init"}
    config = ModelConfig(**{**keys, "num_layers": 3, "hidden_size": 256, "vocab_size": 1000})
    model = FamilyBuilder(FAMILIES["INTERNLM"])(config)
    initialize_parameters(model, seed=1)
    expected = {"embedding.weight": 0.0052, "output.weight": 0.0052}
    for layer in range(3):
        block = f"layers.{layer}"
        expected |= dict.fromkeys((f"{block}.attention.wqkv.weight", f"{block}.feed_forward.w13.weight"), 0.006)
        scaled = 0.006 / math.sqrt(2 * (layer + 1))
        expected |= dict.fromkeys((f"{block}.attention.wo.weight", f"{block}.feed_forward.w2.weight"), scaled)
    matrices = {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1 and "bias" not in name}
    assert matrices == pytest.approx(expected, rel=0.02)
