"""Modules of Hugging Face, unmodified, in several layouts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from internlm.config.schema import ModelConfig
from internlm.model.hf_module import build_hf_module
from internlm.utils.errors import ConfigError
from tests.dist.oracle import verify

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 2,
    "vocab_size": 64,
}
EXTRA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
HF: dict[str, Any] = {
    "mod": "transformers.models.qwen3.modeling_qwen3",
    "mod_cls": "Qwen3ForCausalLM",
    "cfg": "transformers.models.qwen3.configuration_qwen3",
    "cfg_cls": "Qwen3Config",
    "cfg_extra_kwargs": EXTRA,
}
OVERRIDES = ("model_type=hf", *(f"model.hf.{key}={json.dumps(value)}" for key, value in HF.items()))


def module(**changes: Any) -> Any:
    return build_hf_module(ModelConfig.model_validate({**SIZES, "hf": {**HF, **changes}}))


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.zero1.fsdp=True",),
        ("parallel.zero1.fsdp=True", "model.checkpoint=True"),
        pytest.param(("parallel.zero1.size=2",), marks=pytest.mark.wide),
        pytest.param(("parallel.zero1.fsdp=True", "data.use_packed_dataset=False"), marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_a_layout_is_one_process(layout: tuple[str, ...]) -> None:
    report, _ = verify(2, (*OVERRIDES, *layout))
    assert report.failures == []


def test_sequences_of_a_packed_row_do_not_see_one_another() -> None:
    model = module().double()
    ids = torch.randint(64, (12,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(5), torch.arange(7)))
    packed = model(ids, torch.tensor([0, 5, 12]), positions)
    alone = torch.cat((model(ids[None, :5])[0], model(ids[None, 5:])[0]))
    assert torch.allclose(packed, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(packed[5:], model(ids[None])[0, 5:], rtol=1e-3)


def test_blocks_are_the_layers() -> None:
    assert [type(block).__name__ for block in module().blocks()] == ["Qwen3DecoderLayer"] * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mod": "transformers.models.nothing"}, "model.hf.mod: 'transformers.models.nothing' cannot be imported"),
        ({"mod_cls": "Qwen3ForCausalML"}, "model.hf.mod_cls: 'transformers.models.qwen3.modeling_qwen3' has no class"),
        (
            {"cfg_extra_kwargs": EXTRA | {"vocab_size": 65}},
            "model.vocab_size: 64, but vocab_size of Qwen3Config is 65",
        ),
        (
            {"cfg_extra_kwargs": EXTRA | {"hidden_act": 3}},
            "model.hf.cfg_cls: the class does not accept these settings",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        module(**changes)
    assert str(caught.value).startswith(expected)
