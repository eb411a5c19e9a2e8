"""Logits and gradients are those of ``transformers``' Llama with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.unit.model.llama import llama_names, llama_of
from tests.unit.model.samples import decoder, gradients, tokens

BATCH, SEQ_LEN = 2, 24
GQA = {"num_kv_attention_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LLAMA2": ("LLAMA2", {}),
    "LLAMA2 with grouped queries": ("LLAMA2", GQA),
    "INTERNLM2 with grouped queries": ("INTERNLM2", GQA),
    "INTERNLM2 with one kv head": ("INTERNLM2", {"num_kv_attention_heads": 1}),
    "INTERNLM with biases": ("INTERNLM", {}),
    "biases in the feed-forward layer": ("INTERNLM", {"mlp_bias": True}),
    "heads wider than hidden / heads": ("LLAMA2", {"head_dim": 12}),
    "another rope base": ("INTERNLM2", {"rope_base": 500.0, **GQA}),
    "linear scaling": ("INTERNLM2", {"rope_scaling_factor": 4.0}),
    "another epsilon": ("LLAMA2", {"layer_norm_epsilon": 0.1}),
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, dtype: torch.dtype) -> None:
    family, keys = CASES[case]
    model = decoder(family, dtype, **keys)
    ids = tokens(BATCH, SEQ_LEN)
    ours, theirs = model(ids), llama_of(model)(ids).logits
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()


@pytest.mark.parametrize("seq_len", [24, 64, 100], ids=lambda n: f"{n} of 64 positions")
def test_logits_with_dynamic_ntk(seq_len: int) -> None:
    model = decoder("INTERNLM2", torch.float32, use_dynamic_ntk_rope=True, rope_scaling_factor=2.0, **GQA)
    ids = tokens(1, seq_len)
    theirs = llama_of(model)(ids).logits
    assert (model(ids) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """Gradients of the mean loss agree where some labels are ignored."""
    family, keys = CASES[case]
    model = decoder(family, **keys)
    llama = llama_of(model)
    ids, labels = tokens(BATCH, SEQ_LEN), tokens(BATCH, SEQ_LEN, seed=4)
    labels[0, ::5] = -100
    loss = F.cross_entropy(llama(ids).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    ours = model(ids, labels=labels, grad_scale=1 / (labels != -100).sum().item())
    ours.loss_sum.backward()
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=1e-12)
    mapped = llama_names(model.spec.config, gradients(model))
    assert mapped.keys() == dict(llama.named_parameters()).keys()
    for name, parameter in llama.named_parameters():
        assert (mapped[name] - parameter.grad).norm() <= 1e-11 * parameter.grad.norm(), name


def test_interleaved_rotary_is_the_half_layout_with_rows_permuted() -> None:
    """Row 2i of an interleaved head is row i of a halved one, row 2i + 1 is row i + D/2."""
    halved, interleaved = decoder(**GQA), decoder(qk_interleaved=True, **GQA)
    interleaved.load_state_dict(halved.state_dict())
    half = halved.spec.config.head_size // 2
    with torch.no_grad():
        for block in interleaved.layers.values():
            qk = block.attention.wqkv.weight[:, :-1]  # [G, Q + 1, D, H]: a view
            qk.copy_(torch.stack((qk[:, :, :half], qk[:, :, half:]), 3).flatten(2, 3))
    ids = tokens(BATCH, SEQ_LEN)
    assert torch.allclose(interleaved(ids), halved(ids), rtol=1e-12, atol=1e-12)
