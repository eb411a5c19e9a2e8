"""Comparison of a checkpoint with the run that is to load it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from internlm.checkpoint import compatibility, load_weights
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.config.nested_dict import put
from internlm.config.schema import ModelConfig
from internlm.data.tokenized_source import TokenizedSource
from internlm.model.registry import model_initializer
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem
from tests.unit.checkpoint.samples import in_ranges, save
from tests.unit.data.files import write_bin
from tests.unit.model.samples import decoder, tokens

CONFIG: dict[str, Any] = {
    "model_type": "OWN",  # registered by a user, without defaults
    "model": {**dict.fromkeys(compatibility.ARCHITECTURE, 1), "dtype": "torch.float32", "checkpoint": False},
    "data": {"seq_len": 8, "micro_bsz": 2, "use_packed_dataset": True, "pack_sample_into_one": False, "micro_num": 4},
}
RUN_INFO: dict[str, Any] = {"config": CONFIG, "data": "abc", "seed": 1}


def changed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``tree`` with changes by dotted key, dots written as two underscores."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        put(tree, key.replace("__", "."), value)
    return tree


def texts(problems: Iterable[Problem]) -> list[str]:
    return list(map(str, problems))


# -- configs


def test_the_same_config_is_no_other_architecture() -> None:
    now = changed(CONFIG, model__checkpoint=True, data__seq_len=16)
    assert texts(compatibility.other_architecture("step-1", CONFIG, now)) == []


def test_what_another_version_has_not_saved_is_no_difference() -> None:
    bare = {"model": {}, "data": {}}
    now = changed(CONFIG, model__rope_base=1.0)
    assert texts(compatibility.other_architecture("step-1", bare, now)) == []
    assert texts(compatibility.other_mathematics("step-1", bare, now)) == []
    assert texts(compatibility.other_dtype("step-1", bare, now)) == []
    assert texts(compatibility.other_samples("step-1", changed(RUN_INFO, config=bare), RUN_INFO)) == []


def test_another_architecture_is_told_field_by_field() -> None:
    now = changed(CONFIG, model_type="INTERNLM2", model__num_layers=3, model__num_kv_attention_heads=None)
    assert texts(compatibility.other_architecture("step-1", CONFIG, now)) == [
        "model_type: 'INTERNLM2', but step-1 was saved with 'OWN'. Use the config of the checkpoint",
        "model.num_layers: 3, but step-1 was saved with 1. Use the config of the checkpoint",
        "model.num_kv_attention_heads: None, but step-1 was saved with 1. Use the config of the checkpoint",
    ]


@pytest.mark.parametrize("key", compatibility.ARCHITECTURE)
def test_every_field_of_the_architecture_counts(key: str) -> None:
    (problem,) = compatibility.other_architecture("step-1", CONFIG, changed(CONFIG, **{f"model__{key}": 7}))
    assert problem.where == f"model.{key}"


UNSET: dict[str, Any] = {"qkv_bias": None, "o_bias": None, "mlp_bias": None, "no_bias": None, "qk_interleaved": None}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        *texts(compatibility.other_architecture("step-1", saved, now)),
        *texts(compatibility.other_mathematics("step-1", saved, now)),
    ]


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("INTERNLM2", {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_interleaved": False}),
        ("INTERNLM2", {"no_bias": False}),
        ("INTERNLM2", {"no_bias": True}),
        ("LLAMA", {}),
        ("INTERNLM", {"no_bias": True}),
        ("INTERNLM", {"qkv_bias": False, "o_bias": False}),
    ],
)
def test_defaults_that_are_written_out_are_no_difference(family: str, model: dict[str, Any]) -> None:
    defaults = {"model_type": "INTERNLM2", "model": UNSET}
    written = {"model_type": family, "model": UNSET | model}
    assert differences(defaults, written) == []
    assert differences(written, defaults) == []


def test_what_differs_is_told_with_the_origin_of_its_values() -> None:
    saved = {"model_type": "INTERNLM", "model": UNSET | {"qk_interleaved": True}}
    todo = "Use the config of the checkpoint"
    assert differences(saved, {"model_type": "INTERNLM", "model": UNSET | {"o_bias": False, "no_bias": True}}) == [
        "model.qkv_bias: False (model.no_bias=True), but step-1 was saved with True (the default of INTERNLM). " + todo,
        "model.o_bias: False, but step-1 was saved with True (the default of INTERNLM). " + todo,
        "model.qk_interleaved: False (the default of INTERNLM), but step-1 was saved with True; this changes what the "
        "model computes. Restore the saved value, or set ckpt.allow_model_changes=True to load the weights into the "
        "changed model",
    ]


def test_a_type_that_a_user_registered_has_no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_initializer._modules, "LLAMA", lambda config: None)
    saved = {"model_type": "LLAMA", "model": UNSET}
    (problem,) = compatibility.other_architecture("step-1", saved, {"model_type": "LLAMA2", "model": UNSET})
    assert problem.where == "model_type"
    (problem,) = compatibility.other_architecture("step-1", saved, changed(saved, model__qkv_bias=False))
    assert problem.where == "model.qkv_bias"


@pytest.mark.parametrize("value", [[], {}, "x", 1e300, -1])
@pytest.mark.parametrize("key", ["model_type", *(f"model__{key}" for key in UNSET)])
def test_a_saved_value_of_another_type_is_no_error(key: str, value: Any) -> None:
    now = {"model_type": "INTERNLM2", "model": UNSET}
    assert isinstance(differences(changed(now, **{key: value}), now), list)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.tf32"])
def test_types_that_are_stored_alike_are_the_same(dtype: str) -> None:
    assert texts(compatibility.other_dtype("step-1", CONFIG, changed(CONFIG, model__dtype=dtype))) == []


@pytest.mark.parametrize("dtype", [None, "torch.int8", ["torch.float32"], {}])
def test_a_type_that_no_run_has_is_another_one(dtype: Any) -> None:
    (problem,) = compatibility.other_dtype("step-1", changed(CONFIG, model__dtype=dtype), CONFIG)
    assert problem.where == "model.dtype"


def test_another_type() -> None:
    (text,) = texts(compatibility.other_dtype("step-1", CONFIG, changed(CONFIG, model__dtype="torch.bfloat16")))
    assert text.startswith("model.dtype: 'torch.bfloat16', but step-1 was saved with 'torch.float32'. Restore the")


def test_state_of_another_optimizer() -> None:
    """Only of parameters that are trained still."""
    saved = ["optimizer/exp_avg/a", "optimizer/main/a", "optimizer/exp_avg/b", "optimizer/main/b", "model/a", "rng/0/x"]
    metadata = Metadata(dict.fromkeys(saved, BytesStorageMetadata()))
    assert texts(compatibility.other_states("step-1", metadata, {"optimizer/exp_avg/a", "optimizer/main/a"})) == []
    (text,) = texts(compatibility.other_states("step-1", metadata, {"optimizer/exp_avg/a", "model/a"}))
    assert text.startswith("step-1: optimizer/main: saved for 'a', but this run has no such state. Restore ")


def test_the_same_samples() -> None:
    assert texts(compatibility.other_samples("step-1", RUN_INFO, changed(RUN_INFO, config__data__micro_num=8))) == []


@pytest.mark.parametrize(
    ("key", "value", "start"),
    [
        ("data", "def", "data.train_folder: the data changed after step-1 was saved (fingerprint abc then, def now). "),
        ("seed", 2, "--seed: 2, but step-1 was saved with 1; "),
        ("config__data__seq_len", 16, "data.seq_len: 16, but step-1 was saved with 8; "),
        ("config__data__micro_bsz", 1, "data.micro_bsz: 1, but step-1 was saved with 2; "),
        ("config__data__use_packed_dataset", False, "data.use_packed_dataset: False, but step-1 was saved with True; "),
        (
            "config__data__pack_sample_into_one",
            True,
            "data.pack_sample_into_one: True, but step-1 was saved with False; ",
        ),
    ],
)
def test_other_samples(key: str, value: Any, start: str) -> None:
    (text,) = texts(compatibility.other_samples("step-1", RUN_INFO, changed(RUN_INFO, **{key: value})))
    assert text.startswith(start)


def test_files_of_other_samples_are_named(tmp_path: Path) -> None:
    def info(samples: list[list[int]]) -> dict[str, Any]:
        source = TokenizedSource(str(write_bin(tmp_path / "data/en/x.bin", samples).parents[1]), 0, 100)
        return {**RUN_INFO, "data": source.fingerprint(), "data_files": source.files()}

    before, same, after = info([[1, 2]]), info([[1, 2]]), info([[1, 3]])
    assert texts(compatibility.other_samples("step-1", before, same)) == []
    assert texts(compatibility.other_samples("step-1", before, after)) == [
        "data.train_folder: the data changed after step-1 was saved (changed: en/x.bin). Restore the old data, or set "
        "ckpt.allow_data_changes=True to read on from the saved row of the changed data"
    ]


def test_another_min_length_is_named(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "data/en/x.bin", [[1, 2], [3, 4, 5]]).parents[1]

    def info(min_length: int) -> dict[str, Any]:
        source = TokenizedSource(str(folder), min_length, 100)
        data = {"data": source.fingerprint(), "data_files": source.files()}
        return changed({**RUN_INFO, **data}, config__data__min_length=min_length)

    assert texts(compatibility.other_samples("step-1", info(0), info(2))) == []
    (text,) = texts(compatibility.other_samples("step-1", info(0), info(3)))
    assert text.startswith("data.min_length: 3, but step-1 was saved with 0; this changes the samples of each row. ")


RANDOM = changed(RUN_INFO, config__data__train_folder=None, config__data__fixed_random_dataset_seqlen=False)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seed": 2}, ["--seed"]),
        ({"config__data__seq_len": 16}, ["data.seq_len"]),
        ({"config__data__fixed_random_dataset_seqlen": True}, ["data.fixed_random_dataset_seqlen"]),
        ({"config__model__vocab_size": 7}, []),  # which is another architecture
        ({"config__model__vocab_size": [7]}, []),
        ({}, ["data.train_folder"]),  # another version draws other samples
        ({"config__data__train_folder": "data", "seed": 2}, ["data.train_folder", "--seed"]),
    ],
)
def test_random_data_change_with_the_setting_that_is_named(change: dict[str, Any], where: list[str]) -> None:
    """Their fingerprint changes as well, but the user has no data to restore."""
    now = changed(RANDOM, data="def", **change)
    assert [problem.where for problem in compatibility.other_samples("step-1", RANDOM, now)] == where


# -- tensors and files


def metadata_of(checkpoint: Path) -> Metadata:
    return open_checkpoint(LocalStorage(checkpoint.parent), checkpoint.name).metadata


def logical(**shapes: tuple[int, ...]) -> LogicalTensors:
    return {name.replace("__", "/"): in_ranges(torch.ones(shape), []) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "step-1", logical(model__w=(2, 3), model__b=(2,), optimizer__exp_avg__w=(2, 3)), 1)


def test_all_that_is_wanted_is_there(saved: Path) -> None:
    metadata = metadata_of(saved)
    assert texts(compatibility.missing_tensors("step-1", metadata, logical(model__w=(2, 3)))) == []


def test_missing_tensors_and_other_shapes(saved: Path) -> None:
    wanted = logical(model__w=(3, 2), model__b=(2,), model__c=(1,), optimizer__exp_avg__c=(1,))
    found = texts(compatibility.missing_tensors("step-1", metadata_of(saved), wanted))
    assert found[:2] == [
        "step-1: model/w: expected shape [3, 2], got [2, 3]. Use the config of the checkpoint",
        "step-1: model/c: is missing. Use the config of the checkpoint",
    ]
    assert found[2].startswith("step-1: optimizer/exp_avg/c: is missing. To load only the weights, ")
    assert len(found) == 3


def test_unexpected_parameters_are_told_but_not_what_is_left_of_the_optimizer(saved: Path) -> None:
    found = compatibility.unexpected_tensors("step-1", metadata_of(saved), logical(model__w=(2, 3)))
    expected = "step-1: model/b: the model has no such parameter or buffer. Use the config of the checkpoint"
    assert texts(found) == [expected]


# -- the weights of a checkpoint


def saved_model(tmp_path: Path, **keys: Any) -> Path:
    model = decoder(**keys)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    parameters = {f"model/{name}": in_ranges(p.detach(), []) for name, p in model.named_parameters()}
    return save(tmp_path / "step-1", parameters, 1)


def test_a_model_with_the_weights_of_a_checkpoint_is_that_model(tmp_path: Path) -> None:
    source, model, expected = saved_model(tmp_path), decoder(), decoder()
    load_weights(model, source)
    assert all(torch.equal(a, 1.5 * b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(model(tokens(1, 4)), expected(tokens(1, 4)))


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    source, model = saved_model(tmp_path), decoder(num_layers=1, vocab_size=50)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, source)
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres[:2] == [f"{source}: model/embedding.weight", f"{source}: model/output.weight"]
    assert all(where.startswith(f"{source}: model/layers.1.") for where in wheres[2:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_a_damaged_checkpoint_are_not_loaded(tmp_path: Path) -> None:
    source = saved_model(tmp_path)
    (source / "rank-00000.bin").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"rank-00000\.bin: 0 bytes, manifest says \d+\."):
        load_weights(decoder(), source)


def test_weights_of_an_unfinished_checkpoint_are_not_loaded(tmp_path: Path) -> None:
    source = saved_model(tmp_path)
    source.rename(source.with_name("step-1.tmp-a1"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_weights(decoder(), source)


# -- what the model computes

DENSE: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "apply_post_layer_norm": False,
    "norm_head": False,
    "qk_interleaved": False,
    "rope_base": 10000.0,
    "rope_scaling_factor": 1.0,
    "use_dynamic_ntk_rope": False,
    "max_position_embeddings": 2048,
    "use_sliding_window": False,
    "sliding_window": None,
    "num_experts": 1,
    "top_k": 2,
    "moe_type": "GShard",
    "moe_layer_kwargs": {},
    "drop_rate": 0.1,
}


def changes_of_mathematics(saved: dict[str, Any], **now: Any) -> list[str]:
    model = DENSE | saved
    found = compatibility.other_mathematics("step-1", {"model": model}, {"model": model | now})
    return [problem.where for problem in found]


def test_another_mathematics_is_refused_unless_it_is_allowed() -> None:
    saved, now = {"model": DENSE}, {"model": {**DENSE, "rope_base": 5e5}}
    assert texts(compatibility.other_mathematics("step-1", saved, now)) == [
        "model.rope_base: 500000.0, but step-1 was saved with 10000.0; this changes what the model computes. "
        "Restore the saved value, or set ckpt.allow_model_changes=True to load the weights into the changed model"
    ]


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        ({}, {"drop_rate": 0.2}, []),
        ({}, {"layer_norm_epsilon": 1e-6}, ["layer_norm_epsilon"]),
        ({}, {"apply_post_layer_norm": True}, ["apply_post_layer_norm"]),
        ({}, {"norm_head": True}, ["norm_head"]),
        ({}, {"qk_interleaved": True}, ["qk_interleaved"]),
        ({}, {"rope_scaling_factor": 2.0}, ["rope_scaling_factor"]),
        ({}, {"use_dynamic_ntk_rope": True}, ["use_dynamic_ntk_rope"]),
        ({}, {"max_position_embeddings": 4096}, []),
        ({"use_dynamic_ntk_rope": True}, {"max_position_embeddings": 4096}, ["max_position_embeddings"]),
        ({}, {"sliding_window": 64}, []),
        ({}, {"use_sliding_window": True, "sliding_window": 64}, ["use_sliding_window", "sliding_window"]),
        ({}, {"top_k": 1, "moe_type": "Dropless", "moe_layer_kwargs": {"a": 1}}, []),
        (
            {"num_experts": 4},
            {"top_k": 1, "moe_type": "Dropless", "moe_layer_kwargs": {"a": 1}},
            ["top_k", "moe_type", "moe_layer_kwargs"],
        ),
    ],
)
def test_changes_that_have_an_effect(saved: dict[str, Any], now: dict[str, Any], expected: list[str]) -> None:
    assert changes_of_mathematics(saved, **now) == [f"model.{key}" for key in expected]


#: Keys of the ``model`` section that change neither a parameter's shape nor what is computed from it in evaluation.
NEITHER = {
    "attention_backend",
    "attn_other_init_std",
    "attn_wqkv_init_std",
    "checkpoint",
    "compile",
    "cpu_offloading",
    "drop_rate",
    "dropout_selective_checkpoint",
    "dtype",
    "embed_grad_scale",
    "embed_split_hidden",
    "embedding_init_std",
    "enable_qkv_fusion",
    "ffn_other_init_std",
    "ffn_uplayer_init_std",
    "mlp_layer_fusion",
    "num_chunks",
    "out_head_init_std",
    "parallel_output",
    "residual_in_fp32",
    "use_flash_attn",
    "use_scaled_init",
}


def test_every_key_of_the_model_is_of_one_class() -> None:
    """Otherwise a new key that changes the model would be accepted silently."""
    classes = [*compatibility.ARCHITECTURE, *compatibility.MATHEMATICS, *NEITHER]
    assert sorted(ModelConfig.model_fields) == sorted(classes)
