"""``internlm verify`` names no culprit where nothing is wrong: in random layouts of every debug config."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm.utils.errors import ConfigError
from internlm.verify.compare import LIMITS, compare
from internlm.verify.configs import Plan, make_plan
from internlm.verify.culprit import find_culprit
from internlm.verify.record import RankRecord
from internlm.verify.run import run_rank
from internlm.verify.walk import Walk
from tests.harness.pool import run_ranks

DEBUG = sorted((Path(__file__).parents[2] / "configs" / "debug").glob("*.py"))
MODES = "mtp", "msp", "fsp", "isp"
#: Schedules by number of chunks.
SCHEDULES = (("1F1B", 1), ("ZBH1", 1), ("1F1B", 2), ("ZBV", 2))
#: Options that change what is called or when, each drawn with a probability of a fourth.
OPTIONS = (
    "model.checkpoint=True",
    "model.checkpoint=0.5",
    "model.checkpoint=selective",
    "model.qkv_bias=True",
    "model.o_bias=True",
    "model.tie_word_embeddings=True",
    "model.vocab_size=61",
    "model.norm_type=layernorm",
    "model.parallel_output=False",
    "model.embed_split_hidden=False",
    "loss.label_smoothing=0.1",
    "loss.average=micro_batch",
    "hybrid_zero_optimizer.overlap_sync_grad=True",
    "hybrid_zero_optimizer.overlap_sync_param=True",
    "hybrid_zero_optimizer.clip_grad_norm=0.5",
    "parallel.weight.overlap=True",
    "parallel.zero1.fsdp=True",
    "data.micro_num=3",
    "data.micro_bsz=1",
    "data.use_packed_dataset=False",
    "model.drop_rate=0.1",
    "model.lora={'rank':2,'alpha':4}",
)


def draw(seed: int) -> Plan:
    """Draw a config and a layout of 2 to 4 ranks that fit one another."""
    rng = random.Random(seed)
    for _ in range(100):
        mode, tensor, weight = rng.choice(MODES), rng.choice([1, 2, 2, 4]), rng.choice([1, 2, 4])
        stages, (schedule, chunks) = rng.choice([1, 1, 2, 4]), rng.choice(SCHEDULES)
        world = rng.choice([2, 2, 4])
        sizes = {
            "parallel.tensor.mode": mode,
            "parallel.tensor.size": tensor,
            "parallel.weight.size": weight if mode == "isp" else 1,
            "parallel.pipeline.size": stages,
            "parallel.pipeline.mode": schedule if stages > 1 else "1F1B",
            "model.num_chunks": chunks if stages > 1 else 1,
            "model.num_layers": max(2, stages * chunks),
            "parallel.zero1.size": rng.choice([-1, 1, 2]),
        }
        options = [option for option in OPTIONS if rng.random() < 0.25]
        overrides = [f"{key}={value}" for key, value in sizes.items()] + options
        try:
            return make_plan(rng.choice(DEBUG), overrides, world, steps=1 + seed % 2, shrink=True)
        except ConfigError:  # sizes or options that exclude one another
            continue
    raise AssertionError(f"no layout of seed {seed} is valid")


def records(plan: Plan) -> tuple[RankRecord, list[RankRecord]]:
    """Run a plan, with details, on one process and on its ranks."""
    (alone,) = run_ranks(1, run_rank, plan.reference, plan.seed, plan.steps, plan.data_size, plan.steps - 1)
    return alone, run_ranks(plan.world_size, run_rank, plan.config, plan.seed, plan.steps, 1, plan.steps - 1)


def _seeds() -> Iterator[object]:
    for seed in range(300):
        yield pytest.param(seed, marks=[] if seed < 2 else [pytest.mark.wide])


@pytest.mark.parametrize("seed", list(_seeds()))
def test_a_clean_layout_has_no_culprit(seed: int) -> None:
    plan = draw(seed)
    alone, ranks = records(plan)
    limits = LIMITS[str(plan.config.model.dtype)]
    report = compare(plan.config, alone, ranks, limits.of_later_steps if plan.steps > 1 else limits)
    assert report.failures == []
    assert find_culprit(report, alone, ranks) is None
    assert Walk(alone, ranks, report.forward.limit).compared() > len(alone.passes) * 40
