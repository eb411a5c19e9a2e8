"""Logits and gradients of each family are those of the model of ``transformers`` with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from internlm.config.families import FAMILIES
from tests.unit.model.hf_models import hf_model_of, hf_weights
from tests.unit.model.samples import decoder, gradients, tokens

BATCH, SEQ_LEN = 2, 24
GQA: dict[str, Any] = {"num_kv_attention_heads": 2}
#: Odd sizes: one kv head, heads wider than hidden / heads.
ODD: dict[str, Any] = {"num_kv_attention_heads": 1, "head_dim": 12, "multiple_of": 1}
#: √64 is exact in float32, in which ``transformers`` stores the factor of embeddings.
EXACT: dict[str, Any] = {"hidden_size": 64}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 7}
#: Families that ``transformers`` lacks have the formula of its Llama, with biases or a head that is folded in.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "INTERNLM": ("INTERNLM", {}),
    "INTERNLM2": ("INTERNLM2", GQA),
    "INTERNLM2_PUBLIC": ("INTERNLM2_PUBLIC", ODD),
    "LLAMA": ("LLAMA", {}),
    "LLAMA2": ("LLAMA2", GQA),
    "LLAMA3": ("LLAMA3", GQA),
    "INTERNLM3": ("INTERNLM3", {**GQA, "head_dim": 12}),
    "MISTRAL": ("MISTRAL", {**GQA, "sliding_window": 5}),
    "MISTRAL without window": ("MISTRAL", {**ODD, "use_sliding_window": False}),
    "QWEN2": ("QWEN2", GQA),
    "QWEN2 tied, odd": ("QWEN2", {**ODD, "tie_word_embeddings": True}),
    "QWEN2 with windows in the last layers": ("QWEN2", {**GQA, **WINDOW, "global_layers": (0,)}),
    "QWEN3": ("QWEN3", GQA),
    "QWEN3 with biases, odd": ("QWEN3", {**ODD, "qkv_bias": True, "o_bias": True}),
    "QWEN3 interleaved": ("QWEN3", {**GQA, "qk_interleaved": True}),
    "BAICHUAN2 folded": ("BAICHUAN2", {}),
    "OLMO2": ("OLMO2", GQA),
    "OLMO2 odd": ("OLMO2", ODD),
    "OLMO2 interleaved": ("OLMO2", {**GQA, "qk_interleaved": True}),
    "GEMMA": ("GEMMA", {**GQA, **EXACT}),
    "GEMMA odd": ("GEMMA", {**ODD, **EXACT}),
    "GEMMA3": ("GEMMA3", {**GQA, **EXACT, "num_layers": 7, "sliding_window": 6}),
    "GEMMA3 with another scale, odd": ("GEMMA3", {**ODD, **EXACT, "sliding_window": 5, "attention_scale": 0.25}),
}
LLAMA3_SCALING = dict(type="llama3", factor=8.0, original_max_position=16)
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LLAMA3", {**GQA, "rope_base": 100.0, "head_dim": 32, "rope_scaling": LLAMA3_SCALING}),
    "yarn": ("QWEN3", {**GQA, "head_dim": 32, "rope_scaling": dict(type="yarn", factor=4.0, original_max_position=32)}),
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, dtype: torch.dtype) -> None:
    family, keys = CASES[case]
    compare(family, keys, dtype)


@pytest.mark.parametrize("case", SCALED)
def test_scaled_frequencies(case: str) -> None:
    family, keys = SCALED[case]
    scaled = compare(family, keys, torch.float32)
    plain = decoder(family, torch.float32, **{**keys, "rope_scaling": None})(tokens(BATCH, SEQ_LEN))
    assert (scaled - plain).abs().max() > 1e-2


def compare(family: str, keys: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Compare logits, the loss and its gradients where some labels are ignored; return the logits."""
    model = decoder(family, dtype, **keys)
    theirs = hf_model_of(model, family)
    ids, labels = tokens(BATCH, SEQ_LEN), tokens(BATCH, SEQ_LEN, seed=4)
    labels[0, ::5] = -100
    expected = theirs(ids).logits
    logits = model(ids)
    assert expected.abs().max() > 0.5
    assert (logits - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten())
    loss.backward()
    ours = model(ids, labels=labels, grad_scale=1 / (labels != -100).sum().item())
    ours.loss_sum.backward()
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=TOLERANCES[dtype])
    mapped = dict(hf_weights(model, gradients(model)))
    parameters = dict(theirs.named_parameters())
    assert mapped.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if name == "lm_head.weight" and model.spec.config.norm_head:
            continue  # theirs is the normalised weight
        assert (mapped[name] - parameter.grad).norm() <= TOLERANCES[dtype] * parameter.grad.norm(), name
    return logits.detach()
