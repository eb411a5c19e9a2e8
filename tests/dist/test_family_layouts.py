"""Every layout of every family is one process: norms, windows, heads and residuals are right however they are split.

The engine is that of ``internlm verify``: losses, gradients, parameters, outputs of modules and traffic are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm.verify.compare import compare
from internlm.verify.configs import make_plan
from tests.dist.oracle import reference, run, verify
from tests.harness.pool import run_ranks

UNFUSED = ("model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False")
GEMMA3 = ("model_type=GEMMA3", "model.sliding_window=5", "model.global_layers=(1,)")
#: What a family brings to the layers, as overrides.
FAMILIES: dict[str, tuple[str, ...]] = {
    "OLMO2": ("model_type=OLMO2",),
    "OLMO2, half recomputed": ("model_type=OLMO2", "model.checkpoint=0.5", "model.qkv_bias=True"),
    "GEMMA3": GEMMA3,
    "GEMMA3, offloaded": (*GEMMA3, "model.checkpoint=selective", "model.cpu_offloading=1", "model.vocab_size=67"),
    "QWEN3": ("model_type=QWEN3", "model.qkv_bias=True"),
    "MISTRAL": ("model_type=MISTRAL", "model.sliding_window=7"),
    "BAICHUAN2": ("model_type=BAICHUAN2", "model.vocab_size=67", "model.embed_split_hidden=False"),
    "BAICHUAN2, tied": ("model_type=BAICHUAN2", "model.tie_word_embeddings=True", "loss.label_smoothing=0.1"),
    "unfused": (*UNFUSED, "model.qkv_bias=True", "model.mlp_bias=True", "model.checkpoint=0.5"),
    "unfused, adapters": (*UNFUSED, "model.qkv_bias=True", "model.lora.rank=2", "model.norm_type=layernorm"),
    "OLMO2, unfused": (*UNFUSED, "model_type=OLMO2"),
    "post-norm": ("model.apply_post_layer_norm=True", "model.norm_type=layernorm", "model.o_bias=True"),
}
#: Sizes, as overrides; two ranks each.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "data": (),
    **{mode: (f"parallel.tensor.mode={mode}", "parallel.tensor.size=2") for mode in ("mtp", "msp", "fsp")},
    "isp": ("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=2"),
    "isp, weights alone, overlapped": (
        *("parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.weight.overlap=True"),
        "parallel.weight.memory_pool=True",
    ),
    "1F1B": ("parallel.pipeline.size=2",),
    "ZB-V": ("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "model.num_chunks=2", "model.num_layers=4"),
    "fsdp": ("parallel.zero1.fsdp=True",),
}
#: What :func:`test_debug_configs` does not cover; all others only in the widest sweep.
NARROW = {
    ("OLMO2, half recomputed", "msp"),
    ("GEMMA3", "ZB-V"),
    ("GEMMA3, offloaded", "isp"),
    ("QWEN3", "fsdp"),
    ("BAICHUAN2", "isp, weights alone, overlapped"),
    ("BAICHUAN2, tied", "1F1B"),
    ("unfused", "fsp"),
    ("unfused", "ZB-V"),
    ("unfused", "fsdp"),
    ("unfused, adapters", "isp, weights alone, overlapped"),
    ("OLMO2, unfused", "isp, weights alone, overlapped"),
    ("post-norm", "msp"),
}
DEBUG = sorted((Path(__file__).parents[2] / "configs" / "debug").glob("*.py"))
#: Layouts of the debug configs, of which each is tried in one, and in the widest sweep in all.
IN_TURN = ("mtp", "isp", "1F1B", "fsp", "msp", "ZB-V", "fsdp")


def _rows() -> Iterator[object]:
    for row in itertools.product(FAMILIES, LAYOUTS):
        yield pytest.param(*row, marks=[] if row in NARROW else [pytest.mark.wide])


def assert_equal(ranks: int, overrides: tuple[str, ...], dtype: str = "float64") -> None:
    report, _ = verify(ranks, overrides, dtype=dtype)
    assert report.failures == []
    assert dtype != "float64" or (report.forward.first, report.backward.first) == (None, None)


@pytest.mark.parametrize(("family", "layout"), list(_rows()))
def test_every_family_in_every_layout(family: str, layout: str) -> None:
    assert_equal(2, (*LAYOUTS[layout], *FAMILIES[family]))


def _debug_rows() -> Iterator[object]:
    for index, (config, layout) in enumerate(itertools.product(DEBUG, IN_TURN)):
        marks = [] if index % len(IN_TURN) == index // len(IN_TURN) % len(IN_TURN) else [pytest.mark.wide]
        yield pytest.param(config, layout, marks=marks, id=f"{config.stem}, {layout}")


@pytest.mark.parametrize(("config", "layout"), list(_debug_rows()))
def test_debug_configs(config: Path, layout: str) -> None:
    """As ``internlm verify`` does by default: shrunk, in float64."""
    plan = make_plan(config, LAYOUTS[layout], 2, steps=2, shrink=True)
    report = compare(plan.config, reference(plan), run_ranks(2, run, plan.config, plan.seed, plan.steps))
    assert report.failures == []


#: Four ranks: both ways to split at once, a kv head on several ranks, and tensor groups in a pipeline.
FOUR_RANKS: dict[str, tuple[str, ...]] = {
    "OLMO2, mtp": (
        *("model_type=OLMO2", "parallel.tensor.size=4", "model.num_kv_attention_heads=4"),
        "model.norm_type=layernorm",
    ),
    "OLMO2, 1F1B of msp": (*FAMILIES["OLMO2"], *LAYOUTS["msp"], *LAYOUTS["1F1B"]),
    "OLMO2, fsdp of fsp": (*FAMILIES["OLMO2, half recomputed"], *LAYOUTS["fsp"], *LAYOUTS["fsdp"]),
    "GEMMA3, ZB-V of mtp": (*GEMMA3, *LAYOUTS["mtp"], *LAYOUTS["ZB-V"]),
    "QWEN3, isp": ("model_type=QWEN3", "parallel.tensor.mode=isp", "parallel.tensor.size=4", "parallel.weight.size=2"),
    "unfused, isp": (
        *(*FAMILIES["unfused"], "parallel.tensor.mode=isp", "parallel.tensor.size=4", "parallel.weight.size=2"),
        *("parallel.weight.overlap=True", "model.num_kv_attention_heads=2"),
    ),
    "unfused, fsdp of msp": (*FAMILIES["OLMO2, unfused"], *LAYOUTS["msp"], *LAYOUTS["fsdp"]),
    "BAICHUAN2, isp": (
        *(*FAMILIES["BAICHUAN2, tied"], "model.vocab_size=65"),
        *("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=4"),
    ),
}


@pytest.mark.wide
@pytest.mark.parametrize("case", FOUR_RANKS)
def test_four_ranks(case: str) -> None:
    assert_equal(4, FOUR_RANKS[case])


@pytest.mark.parametrize("layout", ["1F1B", "fsdp"])
def test_residuals_in_float32(layout: str) -> None:
    """Without tensor parallelism, whose sums over ranks are rounded to half precision."""
    assert_equal(2, (*LAYOUTS[layout], "model.residual_in_fp32=True", "model_type=OLMO2"), "bfloat16")
