"""FLOP formulas equal the counts of torch, and those computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm.config.schema import ModelConfig
from internlm.costs.flops import forward_flops_per_token, hardware_flops_per_token, model_flops_per_token
from tests.unit.model.samples import decoder, tokens

SEQ_LEN = 32
TOKENS = 2 * SEQ_LEN
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "INTERNLM": ("INTERNLM", {}),
    "INTERNLM2 with grouped queries": ("INTERNLM2", {"num_kv_attention_heads": 2}),
    "LLAMA2": ("LLAMA2", {}),
    "heads wider than hidden / heads": ("LLAMA2", {"head_dim": 16}),
    "MISTRAL with a window of all tokens": ("MISTRAL", {"sliding_window": SEQ_LEN}),
    "QWEN3": ("QWEN3", {"num_kv_attention_heads": 2, "head_dim": 12}),
    "BAICHUAN2": ("BAICHUAN2", {}),
    "OLMO2, attention recomputed": ("OLMO2", {"checkpoint": "selective"}),
    "GEMMA3": ("GEMMA3", {"num_kv_attention_heads": 2, "num_layers": 7, "sliding_window": 40, "checkpoint": 0.5}),
    "post-norm": ("LLAMA2", {"apply_post_layer_norm": True, "norm_type": "layernorm"}),
    "adapters": ("LLAMA2", {"num_kv_attention_heads": 2, "lora": {"rank": 3}}),
    "adapters of wo and w2": ("QWEN2", {"lora": {"rank": 3, "targets": ["wo", "w2"]}, "checkpoint": 0.5}),
    "adapters of w13": ("OLMO2", {"lora": {"rank": 3, "targets": ["w13"]}, "checkpoint": "selective"}),
    "recompute": ("LLAMA2", {"checkpoint": True}),
    "recompute of attention": ("LLAMA2", {"checkpoint": "selective"}),
    "recompute of one layer in three": ("LLAMA2", {"num_layers": 3, "checkpoint": 0.5}),
}


def counted(case: str, backward: bool) -> tuple[float, ModelConfig]:
    """Return the FLOPs that torch counts per token, and the model's config.

    In float64, because float32 takes kernels that the counter does not know; nor does it know ``addmm_``.
    """
    family, keys = CASES[case]
    model = decoder(family, attention_backend="reference", **keys)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.set_grad_enabled(backward):
        logits = model(tokens(2, SEQ_LEN))
        if backward:
            logits.backward(torch.ones_like(logits))
    return counter.get_total_flops() / TOKENS, model.spec.config


@pytest.mark.parametrize("case", CASES)
def test_forward(case: str) -> None:
    found, config = counted(case, backward=False)
    assert forward_flops_per_token(config, SEQ_LEN) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case: str) -> None:
    found, config = counted(case, backward=True)
    assert hardware_flops_per_token(config, SEQ_LEN) == pytest.approx(found, rel=1e-12)


# Llama 2 7B: 32 layers, hidden 4096, 32 heads, intermediate 11008, vocabulary 32000, sequences of 4096.
ATTENTION = 2 * 4096 * 4096 * 4  # query, key, value and output projection
SCORES = 2 * 4096 * 4096 * 2  # q·kᵀ and p·v
FEED_FORWARD = 2 * 4096 * 11008 * 3  # gate, up, down
HEAD = 2 * 4096 * 32000
LAYERS = 32 * (ATTENTION + SCORES + FEED_FORWARD)


def seven_billion(**keys: Any) -> ModelConfig:
    return ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=32000, **keys)


def test_7b_by_hand() -> None:
    assert forward_flops_per_token(seven_billion(), 4096) == LAYERS + HEAD == 15_361_638_400
    assert model_flops_per_token(seven_billion(), 4096) == 3 * (LAYERS + HEAD)


@pytest.mark.parametrize(("checkpoint", "repeated"), [(False, 0.0), (0.5, 0.5), (True, 1.0)])
def test_recompute_repeats_the_layers_but_not_the_head(checkpoint: bool | float, repeated: float) -> None:
    found = hardware_flops_per_token(seven_billion(checkpoint=checkpoint), 4096)
    assert found == 3 * (LAYERS + HEAD) + repeated * LAYERS


def test_recompute_of_attention_repeats_its_scores() -> None:
    found = hardware_flops_per_token(seven_billion(checkpoint="selective"), 4096)
    assert found == 3 * (LAYERS + HEAD) + 32 * SCORES


def test_windows_count_the_keys_that_they_contain() -> None:
    windows: dict[str, Any] = dict(use_sliding_window=True, sliding_window=1024, global_layers=(5, 11))
    found = forward_flops_per_token(seven_billion(**windows), 4096)
    assert found == LAYERS + HEAD - 30 * SCORES * 3 / 4
    again = hardware_flops_per_token(seven_billion(**windows, checkpoint=0.25), 4096)  # layers 0, 4, …, 28: all local
    assert again == 3 * found + 8 * (LAYERS / 32 - SCORES * 3 / 4)
    assert forward_flops_per_token(seven_billion(**windows), 512) == forward_flops_per_token(seven_billion(), 512)


def test_grouped_queries_save_key_and_value_projections() -> None:
    saved = 32 * 2 * 4096 * (4096 - 1024) * 2
    found = forward_flops_per_token(seven_billion(num_kv_attention_heads=8), 4096)
    assert found == LAYERS + HEAD - saved
