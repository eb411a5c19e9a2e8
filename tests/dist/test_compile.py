"""Compiled blocks change nothing: a run on several ranks, compiled, is that of one process that computes as it is
written. What is compiled, and where a graph has to end, is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from internlm.train.compile import Compiled, compiled_so_far
from internlm.verify.compare import compare
from internlm.verify.record import RankRecord
from internlm.verify.run import run_rank
from tests.dist.oracle import plan_of, reference
from tests.dist.tiny import DYNAMIC_NTK
from tests.harness.pool import run_ranks

ATTENTION, EXCHANGE = "attention depends on the sequence boundaries", "ranks exchange tokens and heads"
HEADS = "ranks sum over their heads"
MASKS = "the key of a mask changes with every step and micro-batch"

#: Ranks, overrides, and of one block the graphs and the breaks.
ROWS: dict[str, tuple[int, tuple[str, ...], Compiled]] = {
    "mtp, with biases": (
        2,
        ("parallel.tensor.size=2", "model_type=INTERNLM", "model.norm_type=layernorm", "model.o_bias=True"),
        Compiled(2, {ATTENTION: 1}),
    ),
    "isp, overlapped, half recomputed": (
        2,
        (
            *("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=2"),
            *("parallel.weight.overlap=True", "model.checkpoint=0.5", *DYNAMIC_NTK),
        ),
        Compiled(4, {EXCHANGE: 2, ATTENTION: 1}),
    ),
    "fsp, all recomputed, offloaded": (
        2,
        ("parallel.tensor.mode=fsp", "parallel.tensor.size=2", "model.checkpoint=True", "model.cpu_offloading=1"),
        Compiled(2, {ATTENTION: 1}),
    ),
    "msp in a pipeline that puts off weights that are not fused": (
        4,
        (
            *("parallel.tensor.mode=msp", "parallel.tensor.size=2"),
            *("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBH1", "model.num_layers=4"),
            *("model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False", "model.qkv_bias=True"),
        ),
        Compiled(2, {ATTENTION: 1}),
    ),
    "OLMO2, whose ranks sum over heads": (
        2,
        ("parallel.tensor.size=2", "model_type=OLMO2", "model.checkpoint=0.5"),
        Compiled(3, {HEADS: 1, ATTENTION: 1}),
    ),
    "GEMMA3, with windows in one layer": (
        2,
        ("parallel.tensor.size=2", "parallel.tensor.mode=fsp", "model_type=GEMMA3", "model.global_layers=(1,)"),
        Compiled(2, {ATTENTION: 1}),
    ),
    "QWEN3 with a normalised head, of isp": (
        2,
        (
            *("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=2"),
            *("model_type=QWEN3", "model.norm_head=True", "model.apply_post_layer_norm=True"),
        ),
        Compiled(4, {EXCHANGE: 2, ATTENTION: 1}),
    ),
    "ZeRO that gathers layer by layer": (
        2,
        ("hybrid_zero_optimizer.overlap_sync_param=True", "hybrid_zero_optimizer.overlap_sync_grad=True"),
        Compiled(2, {ATTENTION: 1}),
    ),
}


def _run(rank: int, world_size: int, *args: Any) -> tuple[RankRecord, Compiled]:
    torch._dynamo.reset()
    counters.clear()
    return run_rank(rank, world_size, *args), compiled_so_far()


def assert_equal(ranks: int, overrides: tuple[str, ...], expected: Compiled, dtype: str = "float64") -> None:
    overrides = ("model.compile=True", *overrides)
    plan = plan_of(ranks, overrides, dtype=dtype)
    assert not plan.reference.model.compile
    records, compiled = zip(*run_ranks(ranks, _run, plan.config, plan.seed, plan.steps, timeout=180), strict=True)
    report = compare(plan.config, reference(plan), records)
    assert report.failures == []
    assert "layers.0" in report.forward.compared
    assert set(map(str, compiled)) == {str(expected)}


#: Compiling costs more than all else here, so the others are left to the widest sweep.
NARROW = ("mtp, with biases",)


@pytest.mark.parametrize("row", [pytest.param(row, marks=[] if row in NARROW else [pytest.mark.wide]) for row in ROWS])
def test_a_compiled_run_is_that_of_one_process(row: str) -> None:
    assert_equal(*ROWS[row])


def test_float32_with_dropout() -> None:
    """Of the number of a layer, of which masks depend, a graph of its own is made once."""
    assert_equal(1, ("model.drop_rate=0.1",), Compiled(4, {ATTENTION: 1, MASKS: 2}), "float32")
