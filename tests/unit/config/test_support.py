"""Settings of features that are not available yet: refused when a run starts, or accepted with a warning."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.config import check_runnable, load_config, resolve
from internlm.config.support import NO_EFFECT, SUPPORTED_VALUES
from internlm.utils.errors import ConfigError
from tests.unit.config.samples import BUSIEST, config_of


def refusals(changes: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_runnable(load_config(config_of(changes)))
    return list(map(str, caught.value.problems))


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_defaults_run(device: str | None) -> None:
    check_runnable(load_config(config_of({}), device_type=device))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.num_shared_experts": 1}, "model.num_shared_experts: 1 is not available in this version. Use 0"),
        (
            {"ckpt.load_ckpt_info": {"path": "x", "ckpt_type": "hf"}},
            "ckpt.load_ckpt_info.content: ('all',), but a folder of type 'hf' holds only the model. "
            "Set it to ('model',)",
        ),
        (
            {"ckpt.stop_file_path": "s3://bucket/stop"},
            "ckpt.stop_file_path: 's3://bucket/stop' is not a local file. Use a local path",
        ),
        (
            {"ckpt.save_ckpt_folder": "local:"},
            "ckpt.save_ckpt_folder: 'local:' names no folder. Use local:FOLDER or a plain path",
        ),
        (
            {"ckpt.save_ckpt_folder": "hdfs://x"},
            "ckpt.save_ckpt_folder: expected local:FOLDER, a plain path or s3://BUCKET/FOLDER, got 'hdfs://x'",
        ),
        (
            {"ckpt.load_ckpt_info": {"path": "boto3:s3:/x"}},
            "ckpt.load_ckpt_info.path: expected local:FOLDER, a plain path or s3://BUCKET/FOLDER, got 'boto3:s3:/x'",
        ),
    ],
)
def test_refused(changes: dict[str, Any], expected: str) -> None:
    assert refusals(changes) == [expected]


def test_all_refusals_are_reported_together() -> None:
    where = [problem.partition(":")[0] for problem in refusals(dict(BUSIEST))]
    assert where == [
        "parallel.sequence_2D.enable",
        "model.num_experts",
    ]


@pytest.mark.parametrize(
    "folder", ["local:llm_ckpts", "/data/ckpts", "ckpts", "./a:b", "s3://bucket/x", "boto3:s3://bucket/x/y", None]
)
def test_folders_of_checkpoints_may_be_local_or_in_an_object_store(folder: str | None) -> None:
    check_runnable(load_config(config_of({"ckpt.save_ckpt_folder": folder})))


def test_settings_without_effect_give_one_warning() -> None:
    changes = {
        "monitor.alert.light_monitor_address": "http://localhost/",
    }
    resolved = resolve(config_of(changes))
    check_runnable(resolved.config)
    (warning,) = resolved.warnings
    assert warning.startswith("No effect in this version: ")
    assert all(key in warning for key in changes)


def test_defaults_give_no_warning() -> None:
    assert resolve(config_of({})).warnings == []


def test_no_key_is_both_refused_and_accepted() -> None:
    assert not set(SUPPORTED_VALUES) & {row.key for row in NO_EFFECT}
