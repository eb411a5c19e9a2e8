"""Values, their sources, and the JSON and hash of what comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from internlm.config import Config, config_hash, load_config, resolve, to_json
from internlm.config.keys import fields, values
from internlm.utils.compat import FrozenConfigError
from tests.unit.config.samples import BUSIEST, SMALLEST, config_of


def test_derived_values() -> None:
    config = load_config(config_of({"adam.adam_beta2": 0.9, "adam.adam_beta2_c": 0.8}))
    assert config.data.valid_micro_num == 4
    assert config.model.num_kv_attention_heads == 8
    assert config.model.head_dim == 8
    assert config.lr_scheduler.total_steps == 100
    assert (config.beta2_scheduler.init_beta2, config.beta2_scheduler.c) == (0.9, 0.8)


def test_given_values_are_not_derived() -> None:
    changes = {"data.valid_micro_num": 3, "model.head_dim": 16, "lr_scheduler.total_steps": 500}
    config = load_config(config_of(changes), device_type="cuda")
    assert (config.data.valid_micro_num, config.model.head_dim, config.lr_scheduler.total_steps) == (3, 16, 500)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "torch.float32"), ("cuda", "torch.bfloat16"), (None, None)])
def test_dtype_follows_the_device(device: str | None, dtype: str | None) -> None:
    assert load_config(SMALLEST, device_type=device).model.dtype == dtype


@pytest.mark.parametrize("chunks", [{}, {"model.num_chunks": 1}, {"model.num_chunks": 2}])
def test_zbv_means_two_chunks(chunks: dict[str, int]) -> None:
    assert load_config(config_of({"parallel.pipeline.mode": "zbv", **chunks})).model.num_chunks == 2


def test_sources() -> None:
    overrides = ["data.micro_num=2", "parallel.tensor=1", "model.moe_layer_kwargs.capacity=2"]
    sources = resolve(config_of({"parallel.zero1": 1, "data.valid_folder": None}), overrides, device_type="cpu").sources
    expected = {
        "model.num_layers": "file",
        "parallel.zero1.size": "file",
        "parallel.zero1.fsdp": "default",
        "data.valid_folder": "file",
        "data.micro_num": "override",
        "parallel.tensor.size": "override",
        "parallel.tensor.mode": "default",
        "model.moe_layer_kwargs": "override",
        "data.valid_micro_num": "derived",
        "model.dtype": "derived",
        "beta2_scheduler.c": "derived",
        "model.num_chunks": "default",
        "adam.adam_beta1": "default",
    }
    assert {key: sources[key] for key in expected} == expected


def test_every_value_has_a_source() -> None:
    resolved = resolve(config_of(BUSIEST))
    assert set(resolved.sources) == {key for key, _ in values(resolved.config)}


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenConfigError, match="frozen"):
        load_config(SMALLEST).data.micro_num = 3  # type: ignore[misc]


def test_resolving_leaves_the_source_alone() -> None:
    source = config_of({"parallel": {"tensor": 2, "sequence_parallel": True}})
    load_config(source, ["parallel.zero1=2"])
    assert source == config_of({"parallel": {"tensor": 2, "sequence_parallel": True}})


def test_json_round_trip() -> None:
    changes = {
        **BUSIEST,
        "ckpt.load_ckpt_info": {"path": "x", "content": ("model", "sampler")},
        "optimizer.param_groups": [{"pattern": "norm", "weight_decay": 0.0}],
    }
    config = load_config(config_of(changes))
    assert Config.model_validate_json(to_json(config)) == config
    assert load_config(json.loads(to_json(config))) == config


#: A list for each key that takes several values, and the keys that it needs beside it.
LISTS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "model.lora.targets": (["wo"], {"model.lora.rank": 2}),
    "model.global_layers": ([1], {"model.use_sliding_window": True, "model.sliding_window": 4}),
    "optimizer.param_groups": ([{"pattern": "norm", "lr_scale": 0.5}], {}),
    "parallel.pipeline.partition": ([3, 1], {"parallel.pipeline.size": 2}),
    "parallel.elastic": ([{"worlds": [2], "layout": {"tensor.size": 1}}], {}),
    "data.weight_changes": ([{"step": 2, "weights": {"en": 1}}], {"data.weights": {"en": 1}, "data.train_folder": "x"}),
    "ckpt.load_ckpt_info.content": (["model"], {"ckpt.load_ckpt_info.path": "x"}),
}


def test_every_key_with_several_values_takes_a_list() -> None:
    in_items = {"parallel.elastic.worlds"}
    assert {key for key, field in fields().items() if "tuple[" in str(field.annotation)} == {*LISTS, *in_items}
    for key, (value, beside) in LISTS.items():
        as_list, as_tuple = (load_config(config_of({**beside, key: kind(value)})) for kind in (list, tuple))
        assert as_list == as_tuple
        assert isinstance(dict(values(as_list))[key], tuple)


def test_configs_with_different_values_have_different_hashes() -> None:
    plain = config_hash(load_config(SMALLEST))
    assert plain == config_hash(load_config(dict(reversed(SMALLEST.items()))))
    assert plain == config_hash(load_config(SMALLEST, ["parallel.tensor=1", "data.micro_num=4"]))
    assert plain != config_hash(load_config(SMALLEST, ["data.micro_num=5"]))
    assert len(plain) == 64
