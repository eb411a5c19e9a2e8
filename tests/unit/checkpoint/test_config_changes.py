"""Changed settings are logged where a run continues: those with an effect on results, and no others."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from internlm.checkpoint.config_changes import (
    WITHOUT_EFFECT,
    changed_settings,
    current_versions,
    learning_rate_jump,
    lines_to_log,
)
from internlm.checkpoint.run_state import RunState
from internlm.config import keys, masked_dict, nested_dict, resolve
from tests.unit.checkpoint.samples import run_state
from tests.unit.config.samples import config_of

STEP = 24


def config(**changes: Any) -> dict[str, Any]:
    """Resolve a small config with changes by dotted key, dots written as two underscores."""
    by_key = {key.replace("__", "."): value for key, value in changes.items()}
    source = config_of({"data.total_steps": 25, "data.micro_num": 1, **by_key})
    return masked_dict(resolve(source, device_type="cpu").config)


def saved(content: dict[str, Any] | None = None, **more: Any) -> RunState:
    rest = {"versions": current_versions(), "world_size": 1}
    return RunState(**{**run_state(STEP), "config": content or config(), **rest, **more})


def changes(state: RunState, world_size: int = 1, seed: int = 1024, **now: Any) -> dict[str, str]:
    return changed_settings(state, {"config": config(**now), "seed": seed}, world_size)


def test_the_same_settings_are_no_change() -> None:
    assert changes(saved()) == {}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (
            {"data__total_steps": 100},
            {"data.total_steps": "25 → 100", "lr_scheduler.total_steps": "25 → 100"},
        ),
        ({"adam__lr": 0.5}, {"adam.lr": "0.001 → 0.5"}),
        ({"beta2_scheduler__init_beta2": 0.99}, {"beta2_scheduler.init_beta2": "0.95 → 0.99"}),
        ({"adam__weight_decay": 0.0}, {"adam.weight_decay": "0.01 → 0.0"}),
        ({"hybrid_zero_optimizer__clip_grad_norm": 1.0}, {"hybrid_zero_optimizer.clip_grad_norm": "0.0 → 1.0"}),
        ({"lr_scheduler__warmup_ratio": 0.5}, {"lr_scheduler.warmup_ratio": "0.0 → 0.5"}),
        ({"loss__label_smoothing": 0.1}, {"loss.label_smoothing": "0.0 → 0.1"}),
        ({"model__drop_rate": 0.1}, {"model.drop_rate": "0.0 → 0.1"}),
        ({"model__dtype": "torch.float64"}, {"model.dtype": "'torch.float32' → 'torch.float64'"}),
        ({"data__micro_num": 2}, {"micro-batches of a global batch": "1 → 2"}),
        ({"data__skip_batches": "1-2"}, {"data.skip_batches": "'' → '1-2'"}),
        ({"model__rope_base": 5e5}, {"model.rope_base": "10000.0 → 500000.0"}),
        (
            {"optimizer__param_groups": [{"pattern": "norm"}]},
            {
                "optimizer.param_groups": "[] → "
                "[{'lr_scale': 1.0, 'pattern': 'norm', 'type': None, 'weight_decay': None}]"
            },
        ),
        # Neither layout nor speed nor initial values change the results of a run that continues.
        ({"model__embedding_init_std": 0.5, "model__checkpoint": True, "data__num_worker": 0, "enable_tb": False}, {}),
        ({"model__max_position_embeddings": 4096}, {}),
        # The saved values, by defaults of another model type.
        ({"model_type": "LLAMA2", "model__qkv_bias": True, "model__o_bias": True, "model__no_bias": False}, {}),
        ({"ckpt__auto_resume": False, "monitor__alert__feishu_alert_address": "https://host/token"}, {}),
    ],
)
def test_changes_with_an_effect(now: dict[str, Any], expected: dict[str, str]) -> None:
    assert changes(saved(), **now) == expected


def test_another_seed() -> None:
    assert changes(saved(), seed=3) == {"--seed": "1024 → 3"}


def test_the_same_global_batch_on_more_ranks_is_no_change() -> None:
    state = saved(config(data__micro_num=4), world_size=1)
    assert changes(state, world_size=2, data__micro_num=2) == {}
    assert changes(state, world_size=2, data__micro_num=4) == {"micro-batches of a global batch": "4 → 8"}
    run_info = {"config": config(data__micro_num=4), "seed": 1024}
    lines = lines_to_log("step-24", state, run_info, {"model", "sampler"}, 2)
    assert list(lines) == [
        (
            logging.WARNING,
            "changed since step-24 was saved: micro-batches of a global batch: 4 → 8. Set data.global_batch to keep it "
            "on any number of ranks",
        )
    ]


def test_a_given_global_batch_is_compared_on_any_number_of_ranks() -> None:
    state = saved(config(data__global_batch=12), world_size=1)
    assert changes(state, world_size=8, data__global_batch=12) == {}
    sequences = config()["data"]["micro_bsz"]
    change = {"micro-batches of a global batch": f"{12 // sequences} → {24 // sequences}"}
    assert changes(state, world_size=1, data__global_batch=24) == change


def test_another_version_of_torch() -> None:
    versions = {**current_versions(), "torch": "1.0", "python": "3.1"}
    assert changes(saved(versions=versions)) == {"version of torch": f"'1.0' → '{current_versions()['torch']}'"}


def test_what_another_version_has_not_saved_is_no_change() -> None:
    assert changes(saved({"model": {}, "data": {}}, versions={}, world_size=None), model__drop_rate=0.5) == {}


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 1e300, 10**300 - 1, {"size": "x"}])
@pytest.mark.parametrize("key", ["adam", "lr_scheduler", "parallel", "adam.lr", "lr_scheduler.total_steps"])
def test_a_saved_config_of_another_shape_is_no_error(key: str, value: Any) -> None:
    content = copy.deepcopy(config())
    nested_dict.put(content, key, value)
    state = saved(content)
    assert isinstance(changes(state), dict)
    assert isinstance(learning_rate_jump(state, config()), str)


# -- the learning rate


def test_a_longer_run_makes_the_learning_rate_jump() -> None:
    state = saved(config(data__total_steps=24))
    assert learning_rate_jump(state, config(data__total_steps=1000)) == (
        "the learning rate jumps from 4.278e-06 to 0.0009986 at step 24"
    )


def test_the_same_schedule_does_not_jump() -> None:
    """Even though the learning rate of the next step differs from that of the last one."""
    assert learning_rate_jump(saved(), config(adam__weight_decay=0.5)) == ""


def test_the_same_learning_rate_from_another_schedule_is_no_jump() -> None:
    state = saved(config(lr_scheduler__type="constant"))
    assert learning_rate_jump(state, config(lr_scheduler__type="constant", data__total_steps=1000)) == ""


# -- the log


def test_each_change_has_a_line_and_a_jump_is_a_warning() -> None:
    run_info = {"config": config(data__total_steps=1000, model__rope_base=5e5), "seed": 1024}
    assert list(lines_to_log("step-24", saved(), run_info, {"model", "sampler"}, 1)) == [
        (logging.INFO, "changed since step-24 was saved: model.rope_base: 10000.0 → 500000.0"),
        (logging.INFO, "changed since step-24 was saved: data.total_steps: 25 → 1000"),
        (logging.INFO, "changed since step-24 was saved: lr_scheduler.total_steps: 25 → 1000"),
        (
            logging.WARNING,
            "the learning rate jumps from 1.571e-05 to 0.0009986 at step 24, because of another "
            "lr_scheduler.total_steps",
        ),
    ]


def test_a_new_run_from_the_weights_only_has_another_model() -> None:
    run_info = {"config": config(data__total_steps=1000, model__rope_base=5e5), "seed": 3}
    lines = [line for _, line in lines_to_log("step-24", saved(), run_info, {"model"}, 1)]
    assert lines == ["changed since step-24 was saved: model.rope_base: 10000.0 → 500000.0"]


def test_keys_without_effect_exist() -> None:
    assert not WITHOUT_EFFECT - keys.fields().keys()
