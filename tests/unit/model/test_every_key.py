"""Every key of the ``model`` section changes something: a key that is ignored would pass unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.config.schema import ModelConfig
from internlm.config.support import NO_EFFECT, SUPPORTED_VALUES, UNREAD
from internlm.core.parallel.initialization import initialize_parameters
from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.utils.dtype import default_dtype
from tests.unit.config.samples import ROOT
from tests.unit.model.samples import SMALL, tokens

WINDOW = {"use_sliding_window": True, "sliding_window": 5}
#: Keys with a value that changes parameters, logits or gradients, and keys that must be set beside it.
NUMBERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_layers": (3, {}),
    "hidden_size": (48, {}),
    "num_attention_heads": (8, {}),
    "vocab_size": (67, {}),
    "num_kv_attention_heads": (2, {}),
    "head_dim": (12, {}),
    "mlp_ratio": (1.0, {}),
    "multiple_of": (17, {}),
    "max_position_embeddings": (16, {"use_dynamic_ntk_rope": True}),
    "norm_type": ("layernorm", {}),
    "layer_norm_epsilon": (0.1, {}),
    "apply_post_layer_norm": (True, {}),
    "qk_norm": ("head", {}),
    "activation": ("gelu_tanh", {}),
    "no_bias": (True, {"qkv_bias": True}),
    "qkv_bias": (True, {}),
    "o_bias": (True, {}),
    "mlp_bias": (True, {}),
    "residual_in_fp32": (True, {"dtype": "torch.bfloat16"}),
    "embed_grad_scale": (0.5, {}),
    "tie_word_embeddings": (True, {}),
    "qk_interleaved": (True, {}),
    "rope_base": (100.0, {}),
    "use_dynamic_ntk_rope": (True, {"max_position_embeddings": 16}),
    "rope_scaling_factor": (2.0, {}),
    "rope_scaling": ({"type": "yarn", "factor": 4.0, "original_max_position": 32}, {}),
    "local_rope_base": (100.0, WINDOW),
    "attention_scale": (0.1, {}),
    "use_sliding_window": (True, {"sliding_window": 5}),
    "sliding_window": (7, WINDOW),
    "global_layers": ((0,), WINDOW),
    "norm_head": (True, {}),
    "enable_qkv_fusion": (False, {}),
    "mlp_layer_fusion": (False, {}),
    "lora": ({"rank": 2}, {}),
    "use_scaled_init": (True, {}),
    **{key: (0.5, {}) for key in ModelConfig.model_fields if key.endswith("_init_std")},
}
#: Keys that change something else, with the test that shows it.
ELSEWHERE = {
    "num_chunks": "tests/dist/test_pipeline.py",
    "checkpoint": "tests/unit/model/test_decoder.py",
    "cpu_offloading": "tests/unit/model/test_memory.py",
    "drop_rate": "tests/unit/model/test_decoder.py",
    "dropout_selective_checkpoint": "tests/unit/model/test_memory.py",
    "compile": "tests/unit/train/test_compile.py",
    "dtype": "tests/dist/test_precision.py",
    "use_flash_attn": "tests/dist/test_activations.py",
    "attention_backend": "tests/unit/model/test_decoder.py",
    "hf": "tests/dist/test_hf_modules.py",
    "parallel_output": "tests/dist/test_split_models.py",
    "embed_split_hidden": "tests/dist/test_parallel.py",
}
NOT_AVAILABLE = {
    key.removeprefix("model.")
    for key in (*SUPPORTED_VALUES, *(row.key for row in NO_EFFECT), *(key for keys in UNREAD.values() for key in keys))
    if key.startswith("model.")
}


def test_the_tables_have_every_key() -> None:
    assert sorted(ModelConfig.model_fields) == sorted({*NUMBERS, *ELSEWHERE, *NOT_AVAILABLE})


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_other_tests_exist(key: str) -> None:
    assert key in (ROOT / Path(ELSEWHERE[key])).read_text()


@pytest.mark.parametrize("key", NUMBERS)
def test_a_key_changes_parameters_logits_or_gradients(key: str) -> None:
    value, beside = NUMBERS[key]
    before, after = observed(beside), observed({**beside, key: value})
    assert before.keys() != after.keys() or any(not same(before[name], after[name]) for name in before)


#: Values for families whose default is the value of :data:`NUMBERS`.
OTHERS = {"qk_norm": "none", "activation": "silu", "local_rope_base": 50.0}


@pytest.mark.wide
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"INTERNLM2"}))
def test_a_key_changes_every_family(family: str) -> None:
    ignored, row = set(), FAMILIES[family]
    for key, (value, beside) in NUMBERS.items():
        default = row.keys.get(key)
        other = (not value if isinstance(value, bool) else OTHERS[key]) if default == value else value
        # With one layer that attends to all tokens: the small model has none of those of the family.
        beside = {"global_layers": (1,), **beside} if row.global_every else beside
        before, after = observed(beside, family), observed({**beside, key: other}, family)
        if before.keys() == after.keys() and all(same(before[name], after[name]) for name in before):
            ignored.add(key)
    # A tied head has no initial values, and a key that sets them is warned about.
    assert ignored == ({"out_head_init_std"} if row.keys.get("tie_word_embeddings") else set())


def observed(keys: dict[str, Any], family: str = "INTERNLM2") -> dict[str, torch.Tensor]:
    """Initial parameters, logits and gradients of a small decoder."""
    config = ModelConfig.model_validate({**SMALL, **keys})
    with default_dtype(torch.bfloat16 if config.dtype == "torch.bfloat16" else torch.float32):
        model = FamilyBuilder(FAMILIES[family])(config)
    initialize_parameters(model, seed=1)
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = tokens(1, 24)
    found["logits"] = model(ids).detach()
    model(ids, labels=ids).loss_sum.backward()
    return found | {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
