"""The configs of this repository, and those that users bring, resolve."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm.config import check_runnable, load_config, load_file, resolve
from internlm.utils.errors import ConfigError
from tests.unit.config.samples import ROOT, SHIPPED, python_blocks

REFERENCE = Path(__file__).with_name("reference_config.py")
OLD_PARALLEL = {
    "zero1": 8,
    "tensor": 2,
    "pipeline": {"size": 2, "interleaved_overlap": True},
    "sequence_parallel": True,
}


@pytest.mark.parametrize("path", SHIPPED)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shipped_configs_resolve(path: str, device: str) -> None:
    assert load_config(ROOT / path, world_size=8, device_type=device).JOB_NAME


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_configs_run(path: str) -> None:
    check_runnable(load_config(ROOT / path, world_size=8, device_type="cpu"))


def test_the_isp_config_uses_all_of_isp() -> None:
    parallel = load_config(ROOT / "configs/7B_isp_sft.py", world_size=8).parallel
    assert (parallel.tensor.mode, parallel.tensor.size, parallel.weight.size) == ("isp", 2, 4)
    assert parallel.weight.overlap
    assert parallel.weight.memory_pool


@pytest.mark.parametrize("path", [path for path in SHIPPED if "debug" in path])
def test_configs_with_a_feature_to_come_do_not_run(path: str) -> None:
    config = load_config(ROOT / path, overrides=["model.num_shared_experts=1"], world_size=8)
    with pytest.raises(ConfigError, match=r"^model\.num_shared_experts: 1 is not available"):
        check_runnable(config)


@pytest.mark.parametrize("path", [path for path in SHIPPED if "debug" in path])
def test_debug_configs_are_small_and_save_nothing(path: str) -> None:
    config = load_config(ROOT / path)
    assert config.model.hidden_size <= 128
    assert config.data.train_folder is None
    assert not config.ckpt.enable_save_ckpt
    assert config.data.total_steps <= 20


def test_7b_shapes() -> None:
    shapes = {
        path: load_config(ROOT / f"configs/{path}.py").model
        for path in ("7B_sft", "7B_isp_sft", "7B_internlm2", "7B_llama2")
    }
    assert {path: model.intermediate_size for path, model in shapes.items()} == {
        "7B_sft": 11008,
        "7B_isp_sft": 11008,
        "7B_internlm2": 14336,
        "7B_llama2": 11008,
    }
    assert {model.head_size for model in shapes.values()} == {128}


def test_a_users_config_resolves_and_runs() -> None:
    resolved = resolve(REFERENCE, world_size=8, device_type="cuda")
    check_runnable(resolved.config)
    assert resolved.config.beta2_scheduler.init_beta2 == 0.95
    assert resolved.config.parallel.pipeline.mode == "1F1B"
    assert resolved.warnings == []


def test_nothing_that_a_user_gave_is_lost() -> None:
    given = load_file(REFERENCE)
    config = load_config(REFERENCE).model_dump()
    lost = {
        (section, key)
        for section, content in given.items()
        if isinstance(content, dict)
        for key, value in content.items()
        if not isinstance(value, dict) and config[section][key] != value
    }
    assert lost == set()


def test_an_old_parallel_section_resolves() -> None:
    config = load_config({**load_file(REFERENCE), "parallel": OLD_PARALLEL}, world_size=32).parallel
    assert (config.zero1.size, config.tensor.size, config.tensor.mode, config.pipeline.size) == (8, 2, "msp", 2)


def test_configs_in_the_docs_resolve(tmp_path: Path) -> None:
    block = next(python_blocks((ROOT / "doc/config.md").read_text(encoding="utf-8")))
    path = tmp_path / "example.py"
    path.write_text(block)
    check_runnable(load_config(path, world_size=8, device_type="cuda"))
