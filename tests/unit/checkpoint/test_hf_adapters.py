"""Adapters are added to the weights of an exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.checkpoint.hf_samples import exported
from tests.unit.model.samples import tokens
from tests.unit.model.test_lora import adapted


@pytest.mark.parametrize("targets", [("wqkv", "wo", "w13", "w2"), ("w13",)], ids=str)
def test_a_model_with_adapters_is_exported_with_merged_weights(targets: tuple[str, ...], tmp_path: Path) -> None:
    keys = {"lora": {"rank": 3, "alpha": 6.0, "targets": targets}, "qkv_bias": False}
    model = adapted(torch.float32, **keys)
    folder = exported(model, "INTERNLM2", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokens(2, 24)
    expected = model(ids)
    assert (theirs(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any("lora" in name for name, _ in theirs.named_parameters())
