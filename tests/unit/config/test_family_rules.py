"""Settings of families that contradict one another are refused, rather than one of them ignored."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.config import resolve
from internlm.config.rules.model_rules import NOT_OF_HF_MODULES
from internlm.config.schema import ModelConfig
from tests.unit.config.samples import config_of, problems_of

LLAMA3: dict[str, Any] = {"type": "llama3", "factor": 8.0, "original_max_position": 32}
YARN: dict[str, Any] = {**LLAMA3, "type": "yarn"}
WINDOW = {"model.use_sliding_window": True, "model.sliding_window": 4}
HF = dict.fromkeys(("mod", "mod_cls", "cfg", "cfg_cls"), "x")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.rope_scaling": LLAMA3, "model.rope_scaling_factor": 2.0}, "model.rope_scaling: is given beside"),
        ({"model.rope_scaling": LLAMA3, "model.use_dynamic_ntk_rope": True}, "model.rope_scaling: is given beside"),
        ({"model.rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "model.rope_scaling: low_freq_factor = 1.0"),
        ({"model.use_sliding_window": True}, "model.use_sliding_window: True, but model.sliding_window is not given"),
        ({"model.rope_scaling": {**YARN, "beta_slow": 32}}, "model.rope_scaling: beta_slow = 32 is not less than"),
        (
            {"model.rope_scaling": {**LLAMA3, "beta_slow": 2}},
            "model.rope_scaling.beta_slow: 2 is read by the type 'yar",
        ),
        ({"model.rope_scaling": {**YARN, "high_freq_factor": 5}}, "model.rope_scaling.high_freq_factor: 5 is read by"),
        ({"model.rope_scaling": YARN, "model.rope_base": 1}, "model.rope_base: 1 makes no frequency lower than anoth"),
        (
            {**WINDOW, "model.global_layers": [1, 4, 9]},
            "model.global_layers: the model has no layer 4, 9: model.num_la",
        ),
        ({**WINDOW, "model.global_layers": [1, 1]}, "model.global_layers: names layer 1 more than once. Name each"),
        ({**WINDOW, "model.global_layers": [-1]}, "model.global_layers: -1 is out of range"),
        ({"model_type": "GEMMA3", "model.num_layers": "6"}, "model.num_layers: '6' is a string"),
        ({**WINDOW, "model.max_window_layers": "2"}, "model.max_window_layers: expected a number of layers, got '2'"),
        (
            {**WINDOW, "model.max_window_layers": 2, "model.global_layers": [0]},
            "model.max_window_layers: is given beside model.global_layers, which",
        ),
        (
            {"model.attention_backend": "flash", "model.use_flash_attn": False},
            "model.attention_backend: 'flash' is a kernel of flash-attn, which model.use_flash_attn = False forbids",
        ),
        ({"model.lora": {"rank": 2, "targets": []}}, "model.lora.targets: [] is out of range"),
        ({"model.hf": HF}, "model.hf: is given, but model_type = 'INTERNLM' is a family of its own. Remove it, or"),
        ({"model_type": "hf", "model.hf": HF, "model.drop_rate": 0.1}, "model.drop_rate: 0.1 has no effect on the mod"),
        (
            {"model_type": "hf", "model.hf": HF, "model.checkpoint": "selective"},
            "model.checkpoint: 'selective' has no e",
        ),
        (
            {"model_type": "hf", "model.hf": HF, "use_fp32_norm": True},
            "use_fp32_norm: True has no effect on the module",
        ),
        ({"model_type": "hf", "model.lora": {"rank": 2}}, "model.lora: is given, but the model type 'hf' is not"),
    ],
    ids=str,
)
def test_contradictions_are_named(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changes)
    assert problem.startswith(expected)


def test_every_key_is_known_to_reach_a_module_of_hugging_face_or_not() -> None:
    sizes = {"num_layers", "hidden_size", "num_attention_heads", "num_kv_attention_heads", "vocab_size"}
    of_costs = {"head_dim", "mlp_ratio", "multiple_of"}
    around_blocks = {"checkpoint", "cpu_offloading", "compile", "dtype", "num_chunks"}
    with_warning = {"dropout_selective_checkpoint", "top_k", "moe_type", "moe_layer_kwargs"}
    refused = {"lora", "num_experts", "num_shared_experts"}
    keys = {"hf", *sizes, *of_costs, *around_blocks, *with_warning, *refused}
    assert keys.isdisjoint(NOT_OF_HF_MODULES)
    assert keys | set(NOT_OF_HF_MODULES) == set(ModelConfig.model_fields)


def test_layers_without_window_are_at_most_all() -> None:
    model = resolve(config_of({"model_type": "MISTRAL", "model.max_window_layers": 28})).config.model
    assert model.global_layers == (0, 1, 2, 3)
