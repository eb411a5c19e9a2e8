"""Old spellings load as new ones; the two together don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm.config import Config, load_config, resolve
from internlm.config.foreign import Findings
from internlm.config.legacy import normalise
from internlm.config.nested_dict import plain
from tests.unit.config.samples import BUSIEST, config_of, problems_of


def resolved(**sections: Any) -> Config:
    return load_config(config_of(sections))


def test_sizes_may_be_plain_numbers() -> None:
    old = resolved(parallel={"zero1": 8, "tensor": 2, "pipeline": 2, "weight": 1, "expert": 4, "expert_weight": 1})
    sections = {"zero1": 8, "tensor": 2, "pipeline": 2, "weight": 1, "expert": 4, "expert_weight": 1}
    assert old == resolved(parallel={name: {"size": size} for name, size in sections.items()})


@pytest.mark.parametrize(
    ("parallel", "mode"),
    [
        ({"tensor": 2, "sequence_parallel": True}, "msp"),
        ({"tensor": 2, "sequence_parallel": False}, "mtp"),
        ({"tensor": {"size": 2}, "sequence_parallel": True}, "msp"),
        ({"tensor": {"size": 2, "mode": "isp"}, "sequence_parallel": True}, "isp"),
        ({"tensor": {"size": 2, "mode": "mtp"}, "sequence_parallel": False}, "mtp"),
        ({"sequence_parallel": None}, "mtp"),
    ],
)
def test_sequence_parallel_agrees_with_the_mode(parallel: dict[str, Any], mode: str) -> None:
    assert resolved(parallel=parallel).parallel.tensor.mode == mode


@pytest.mark.parametrize(("mode", "flag"), [("mtp", True), ("fsp", False), ("isp", False)])
def test_sequence_parallel_against_the_mode(mode: str, flag: bool) -> None:
    changes = {"parallel": {"tensor": {"size": 2, "mode": mode}, "sequence_parallel": flag}}
    assert problems_of(changes) == [
        f"parallel.sequence_parallel: {flag} contradicts parallel.tensor.mode = '{mode}'. "
        "Remove it: parallel.tensor.mode implies its value"
    ]


def test_renamed_key() -> None:
    assert resolved(model={**config_of({})["model"], "moe_gate_k": 1}).model.top_k == 1


def test_renamed_key_beside_its_new_name() -> None:
    assert problems_of({"model.moe_gate_k": 1, "model.top_k": 2}) == [
        "model.moe_gate_k: contradicts its new name: it means model.top_k = 1, but model.top_k = 2. "
        "Remove model.moe_gate_k"
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("torch.half", "torch.float16"),
        ("torch.tf32", "torch.tf32"),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.float16, "torch.float16"),
    ],
)
def test_dtypes(written: Any, read: str) -> None:
    assert load_config(config_of({"model.dtype": written})).model.dtype == read


@pytest.mark.parametrize("mode", ["1f1b", "zbh1", "zbv", "ZBV", "gpipe", "GPipe"])
def test_pipeline_mode_in_any_case(mode: str) -> None:
    assert load_config(config_of({"parallel.pipeline.mode": mode})).parallel.pipeline.mode == mode.upper()


@pytest.mark.parametrize("written", [[3, 1], (3, 1)])
def test_a_partition_in_any_form(written: Any) -> None:
    keys = {"parallel.pipeline": {"size": 2, "partition": written}}
    assert load_config(config_of(keys)).parallel.pipeline.partition == (3, 1)


@pytest.mark.parametrize("text", ["[3,1]", "(3, 1)", "3,1"])
def test_a_partition_on_the_command_line(text: str) -> None:
    config = load_config(config_of({"parallel.pipeline": 2}), [f"parallel.pipeline.partition={text}"])
    assert config.parallel.pipeline.partition == (3, 1)


@pytest.mark.parametrize("name", ["uniform", "parameters", "flops"])
def test_a_partition_by_name_on_the_command_line(name: str) -> None:
    config = load_config(config_of({"parallel.pipeline": 2}), [f"parallel.pipeline.partition={name}"])
    assert config.parallel.pipeline.partition == name


@pytest.mark.parametrize(
    ("written", "read"), [("model", ("model",)), (["model", "sampler"], ("model", "sampler")), (("all",), ("all",))]
)
def test_load_content_in_any_form(written: Any, read: tuple[str, ...]) -> None:
    config = load_config(config_of({"ckpt.load_ckpt_info": {"path": "local:x", "content": written}}))
    assert config.ckpt.load_ckpt_info is not None
    assert config.ckpt.load_ckpt_info.content == read


@pytest.mark.parametrize("value", [True, False, 0, 1, 0.5])
def test_checkpoint_is_a_switch_or_a_fraction(value: float) -> None:
    assert load_config(config_of({"model.checkpoint": value})).model.checkpoint == value


def test_none_means_not_set() -> None:
    changes = {"grad_scaler": {"max_scale": None, "fp16": {"min_scale": None}}, "data.rampup_batch_size": None}
    assert load_config(config_of(changes)) == load_config(config_of({}))


def test_none_for_a_key_that_is_needed() -> None:
    message = "adam.lr: missing (Peak learning rate). Set it to a number of more than 0"
    assert problems_of({"adam.lr": None}) == [message]


def test_ignored_key_is_reported() -> None:
    assert resolve(config_of({"metric_dtype": "fp32"})).warnings == [
        "No effect in this version: metric_dtype (metrics are always computed in float32)"
    ]


OLD_FOLDER = "ckpt.load_ckpt_folder"
NOT_READ = "ckpt.load_ckpt_folder: this key is deprecated and no longer read. Set ckpt.load_ckpt_info = dict(path=..., "


@pytest.mark.parametrize(
    "info", [None, {"path": None, "content": ("model",)}, {"path": "local:x/xxxx", "content": ("model",)}]
)
def test_an_old_key_of_a_checkpoint_is_refused_where_nothing_else_names_one(info: dict[str, Any] | None) -> None:
    changes = {OLD_FOLDER: "local:old/500", "ckpt.load_ckpt_info": info}
    (problem,) = problems_of(changes)
    assert problem.startswith(NOT_READ)
    (problem,) = problems_of({OLD_FOLDER: "local:runs", "ckpt.save_ckpt_folder": "runs/", "ckpt.auto_resume": False})
    assert problem.startswith(NOT_READ)


@pytest.mark.parametrize(
    ("changes", "overrides", "reason"),
    [
        ({"ckpt.load_ckpt_info": {"path": "local:new/500"}}, [], "ckpt.load_ckpt_info says"),
        ({"ckpt.load_ckpt_info": {"path": "x/xxxx"}}, ["ckpt.load_ckpt_info.path=new/500"], "ckpt.load_ckpt_info says"),
        ({"ckpt.save_ckpt_folder": "old/500/"}, [], "a run continues from"),
        ({"ckpt.save_ckpt_folder": "old/500", "ckpt.auto_resume": False}, ["ckpt.auto_resume=True"], "a run continues"),
    ],
)
def test_an_old_key_of_a_checkpoint_is_ignored_where_another_replaces_it(
    changes: dict[str, Any], overrides: list[str], reason: str
) -> None:
    given = {OLD_FOLDER: "local:old/500", "ckpt.checkpoint_every": 5, **changes}
    (warning,) = resolve(config_of(given), overrides).warnings
    assert f"ckpt.load_ckpt_folder ({reason}" in warning


@pytest.mark.parametrize("changes", [BUSIEST, {"parallel": {"tensor": 2, "sequence_parallel": True}}])
def test_normalising_twice_changes_nothing_more(changes: dict[str, Any]) -> None:
    once = config_of(changes)
    normalise(once, Findings())
    twice, found = plain(once), Findings()
    normalise(twice, found)
    assert twice == once
    assert found == Findings()
