from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from internlm.config import Config, load_config
from internlm.config.schema.fields import parse_rampup
from internlm.config.schema.parallel import PipelineConfig
from internlm.utils.errors import ConfigError
from internlm.verify.configs import Devices, as_overrides, debug_size, default_world_size, make_plan

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(CONFIGS.glob("7B_*.py"))
SMALL: dict[str, Any] = {
    "data": {"seq_len": 16, "micro_bsz": 2, "micro_num": 3, "total_steps": 5},
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 64},
    "adam": {"lr": 1e-3},
}


def _config(*overrides: str, keys: dict[str, Any] = SMALL) -> Config:
    return load_config(keys, overrides, device_type="cpu")


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ((), 2),
        (("parallel.tensor.size=2",), 4),
        (("parallel.tensor.size=8",), 8),
        (("parallel.zero1.size=3",), 6),
        (("parallel.tensor.size=2", "parallel.zero1.size=2"), 8),
        (("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=4"), 8),
        (("parallel.tensor.mode=isp", "parallel.weight.size=3"), 6),
        (("parallel.pipeline.size=2",), 4),
        (("parallel.pipeline.size=2", "parallel.tensor.size=2"), 8),
        (("parallel.pipeline.size=4", "parallel.zero1.size=2", "data.micro_num=4"), 8),
        (("parallel.pipeline.size=3", "parallel.tensor.mode=isp", "parallel.weight.size=2"), 6),
        (("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "model.num_chunks=2"), 4),
    ],
)
def test_default_world_size(overrides: tuple[str, ...], world_size: int) -> None:
    assert default_world_size(_config(*overrides)) == world_size
    assert make_plan(SMALL, ("model.num_attention_heads=8", *overrides)).world_size == world_size


def test_the_reference_has_the_same_model_and_global_batch() -> None:
    overrides = ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "data.rampup_batch_size='1 2 100'")
    plan = make_plan(SMALL, overrides, world_size=8, steps=2)
    assert (plan.world_size, plan.data_size) == (8, 4)
    assert plan.reference.model == plan.config.model
    assert plan.reference.data.micro_num == 12
    assert parse_rampup(plan.reference.data.rampup_batch_size) == (4, 8, 100)
    assert (plan.reference.parallel.tensor.size, plan.reference.parallel.zero1.size) == (1, 1)
    assert plan.config.parallel.tensor.mode == "msp"
    assert plan.config.model.dtype == "torch.float64"


def test_the_reference_has_no_pipeline(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    sizes = ("parallel.pipeline.size=2", "model.num_chunks=2", "parallel.pipeline.mode=ZBV")
    plan = make_plan(SMALL, (*sizes, "parallel.pipeline.partition=(1,1,1,1)", f"parallel.pipeline.table={table}"))
    assert (plan.world_size, plan.data_size) == (4, 2)
    assert plan.reference.parallel.pipeline == PipelineConfig()
    assert plan.reference.model.num_chunks == 1
    assert plan.reference.data.micro_num == 6
    assert plan.config.parallel.pipeline.partition == (1, 1, 1, 1)
    assert plan.config.parallel.pipeline.table == str(table)


@pytest.mark.parametrize("mode", ["1F1B", "ZBV"])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_pipeline_shrinks(stages: int, mode: str, tmp_path: Path) -> None:
    pipeline = {"size": stages, "mode": mode, "table": str(tmp_path / "own.csv")}
    large = {
        **SMALL,
        "data": {**SMALL["data"], "micro_num": 5 * stages},
        "model": {**SMALL["model"], "num_layers": 80, "num_chunks": 2},
    }

    def shrunk(partition: Any) -> Config:
        keys = {**large, "parallel": {"pipeline": {**pipeline, "partition": partition}}}
        return make_plan(keys, shrink=True).config

    small = shrunk((81 - 2 * stages, *[1] * (2 * stages - 1)))
    assert (small.model.num_layers, small.model.num_chunks, small.data.micro_num) == (2 * stages, 2, stages)
    assert (small.parallel.pipeline.partition, small.parallel.pipeline.table) == ("uniform", None)
    assert small.parallel.pipeline.mode == mode
    assert shrunk("flops").parallel.pipeline.partition == "flops"


def test_processes_on_gpus_have_one_each_and_deterministic_kernels() -> None:
    plans = [make_plan(SMALL, devices=Devices("cuda", count)) for count in (1, 3, 16)]
    assert [plan.world_size for plan in plans] == [1, 2, 2]
    assert {plan.device_type for plan in plans} == {"cuda"}
    assert all(plan.config.cudnn_deterministic and plan.reference.cudnn_deterministic for plan in plans)
    assert plans[0].config.model.dtype == "torch.float64"
    plan = make_plan(SMALL, ("cudnn_deterministic=False",), devices=Devices("cuda", 2))
    assert not plan.config.cudnn_deterministic
    assert not make_plan(SMALL).config.cudnn_deterministic


def test_nothing_is_saved_or_told() -> None:
    keys = {
        **SMALL,
        "ckpt": {"enable_save_ckpt": True, "save_ckpt_folder": "s3://far/away", "checkpoint_every": 5},
        "monitor": {"alert": {"enable_feishu_alert": True, "feishu_alert_address": "http://a.b"}},
    }
    config = make_plan(keys).config
    assert not config.ckpt.enable_save_ckpt
    assert not config.monitor.alert.enable_feishu_alert
    assert not config.enable_tb


def test_layers_of_both_sorts_remain_when_a_config_with_windows_is_shrunk() -> None:
    windows = {"num_layers": 12, "use_sliding_window": True, "sliding_window": 4096, "global_layers": (5, 11)}
    model = make_plan({**SMALL, "model": {**SMALL["model"], **windows}}, shrink=True).config.model
    assert [model.window(layer) for layer in range(model.num_layers)] == [16, None]


@pytest.mark.parametrize("key", ["load_ckpt_folder", "load_model_only_folder"])
def test_the_folder_that_a_run_continues_from_is_not_loaded(key: str) -> None:
    ckpt = {"save_ckpt_folder": "local:ckpts", key: "local:ckpts", "auto_resume": True}
    config = make_plan({**SMALL, "ckpt": ckpt}).config
    assert config.ckpt.save_ckpt_folder is None
    assert config.ckpt.load_ckpt_info is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ("model.hiden_size=3",)}, "--set model.hiden_size: unknown key"),
        ({"overrides": ("parallel.tensor.size=2",), "world_size": 3}, "world size 3 is not divisible"),
        ({"steps": 6}, "--steps: must be at most data.total_steps = 5, got 6"),
        ({"overrides": ("model.num_experts=2",)}, "model.num_experts"),
        (
            {"world_size": 2, "devices": Devices("cuda", 1)},
            r"--world: 2 processes need a device each, but this machine has 1 \(cuda\). Lower it",
        ),
        (
            {"overrides": ("parallel.tensor.size=4",), "devices": Devices("cuda", 2)},
            "--world: 4 processes need a device each, but this machine has 2",
        ),
        (
            {"overrides": ("model.attention_backend=flash",), "devices": Devices("cuda", 2)},
            "'flash' requires a CUDA device and torch.float16 or torch.bfloat16, got cuda and torch.float64",
        ),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(SMALL, **arguments)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_shrink(file: Path) -> None:
    """What is a ratio or a kind stays."""
    large, small = load_config(file, device_type="cpu"), make_plan(file, shrink=True).config
    assert small.model.num_layers == 2
    assert small.model.hidden_size <= 256
    assert small.model.vocab_size % 2
    assert small.data.train_folder is None
    assert small.model.num_attention_heads // small.model.kv_heads == (
        large.model.num_attention_heads // large.model.kv_heads
    )
    same = ("norm_type", "mlp_ratio", "checkpoint", "tie_word_embeddings", "rope_base", "qk_interleaved")
    assert all(getattr(small.model, key) == getattr(large.model, key) for key in same)
    assert small.parallel == large.parallel


def test_overrides_outdo_the_debug_size() -> None:
    assert make_plan(SMALL, ("data.micro_num=5",), shrink=True).config.data.micro_num == 5


@pytest.mark.parametrize(
    ("heads", "kv_heads", "layout"),
    [
        (32, 1, ()),
        (32, 8, ("tensor.size=2",)),
        (24, 3, ("tensor.size=3",)),
        (18, 6, ("tensor.size=6", "tensor.mode=msp")),
        (96, 96, ("tensor.size=8",)),
        (32, 1, ("tensor.size=8", "tensor.mode=isp", "weight.size=4")),
        (24, 2, ("tensor.size=6", "tensor.mode=isp", "weight.size=2")),
    ],
)
def test_the_debug_size_suits_the_parallel_sizes(heads: int, kv_heads: int, layout: tuple[str, ...]) -> None:
    model = {"num_attention_heads": heads, "num_kv_attention_heads": kv_heads, "hidden_size": 128 * heads}
    keys = {**SMALL, "model": {**SMALL["model"], **model, "multiple_of": 384}}
    sizes = ["data.seq_len=48", *(f"parallel.{size}" for size in layout)]
    large = _config(*sizes, keys=keys)
    small = _config(*sizes, *as_overrides(debug_size(large)), keys=keys)
    assert small.model.hidden_size <= 384
    assert (small.model.kv_heads > 1) == (kv_heads > 1)
    assert (small.model.kv_heads < small.model.num_attention_heads) == (kv_heads < heads)
