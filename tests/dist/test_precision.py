"""Types: half precision with and without its options equals one process, and what overflows is left out everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from internlm.core.parallel.param_state import complete_main_grad, main_grad_of
from internlm.core.trainer import Hook, StepReport, Trainer
from tests.dist.oracle import verify
from tests.dist.whole_runs import assert_goes_on, assert_same_tensors, fit, resume, saving

FP16, BF16, FP32 = (f"model.dtype=torch.{name}" for name in ("float16", "bfloat16", "float32"))
SCALE = "grad_scaler.fp16.initial_scale"
PIPELINE = ("parallel.pipeline.size=2", "data.micro_num=4")


# -- layouts that round alike


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("use_fp32_norm=True",),
        ("use_fp32_norm=True", "model.norm_type=layernorm", "hybrid_zero_optimizer.overlap_sync_grad=True"),
        ("hybrid_zero_optimizer.overlap_sync_param=True", "hybrid_zero_optimizer.reduce_bucket_size=4000"),
        ("optimizer.type=Muon", "hybrid_zero_optimizer.use_split_tensor_optim=False"),
    ],
    ids=str,
)
def test_data_parallel(dtype: str, overrides: tuple[str, ...]) -> None:
    report, _ = verify(2, overrides, dtype=dtype)
    assert report.failures == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("reduce_comm_dtype=torch.bfloat16",),
        ("hybrid_zero_optimizer.fp32_grad_accum=False",),
        ("hybrid_zero_optimizer.fp32_grad_accum=False", "reduce_comm_dtype=torch.float32"),
    ],
    ids=str,
)
def test_gradients_in_half_precision(overrides: tuple[str, ...]) -> None:
    """What is sent is as by the formula, and gradients are those of one process but for their rounding."""
    report, _ = verify(2, overrides, dtype="bfloat16")
    assert (report.traffic, report.disagreements, report.holes) == ([], [], [])
    assert 1e-5 < max(row.difference for row in report.gradients) < 2e-2
    assert max(row.difference for row in report.losses) < 1e-3


def test_norms_in_float32() -> None:
    tensors = fit(2, [BF16, "use_fp32_norm=True", "data.total_steps=2"]).tensors
    found = {name: tensor.dtype for name, tensor in tensors.items() if name.startswith("model/")}
    assert found["model/norm.weight"] == found["model/layers.0.ffn_norm.weight"] == torch.float32
    assert {dtype for name, dtype in found.items() if "norm" not in name} == {torch.bfloat16}
    assert not [name for name in tensors if "optimizer/main" in name and "norm" in name]


# -- what overflows


@dataclass
class Poison(Hook):
    """Puts ``value`` into a gradient of one rank in some steps."""

    rank: int
    steps: tuple[int, ...]
    value: float = math.inf
    name: str = "layers.1.feed_forward.w2.weight"

    def before_step(self, trainer: Trainer) -> None:
        step = trainer.optimizer.begin_step
        if torch.distributed.get_rank() == self.rank and trainer.state.step in self.steps:

            def poisoned(micro_batches: int | None = None) -> None:
                step(micro_batches)
                parameter = trainer.model.get_parameter(self.name)
                complete_main_grad(parameter)
                main_grad_of(parameter).view(-1)[3] = self.value

            trainer.optimizer.begin_step = poisoned  # type: ignore[method-assign]

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        vars(trainer.optimizer).pop("begin_step", None)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_one_rank_alone_sees_it_and_nobody_updates(rank: int, tmp_path: Path) -> None:
    """Step 2 of three: afterwards all is bitwise what it was before."""
    overlaps = [f"hybrid_zero_optimizer.overlap_sync_{each}=True" for each in ("grad", "param")]
    overrides = [FP32, f"log_folder={tmp_path}", "data.total_steps=6", "parallel.zero1.size=2", *overlaps]
    clean = fit(4, overrides, stop_after=2)
    bad = fit(4, overrides, stop_after=3, hooks=[Poison(rank, (2,), math.nan)])
    assert_same_tensors(bad.tensors, clean.tensors)
    assert bad.ranks[0].steps == clean.ranks[0].steps
    assert (bad.state["step"], bad.state["inf_nan_skip_batches"]) == (3, 1)


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.attention.wqkv.weight", "layers.1.attention.wo.bias"])
@pytest.mark.parametrize("mode", ["mtp", "msp"])
def test_one_rank_of_a_tensor_group_alone_sees_it(mode: str, name: str, tmp_path: Path) -> None:
    """In a parameter of which it holds a copy, or a part."""
    layout = [f"parallel.tensor.mode={mode}", "parallel.tensor.size=2", "model_type=INTERNLM"]
    heads = "model.num_kv_attention_heads=4"
    overrides = [FP32, f"log_folder={tmp_path}", "data.total_steps=6", *layout, heads]
    bad = fit(2, overrides, stop_after=2, hooks=[Poison(1, (1,), math.nan, name)])
    assert_same_tensors(bad.tensors, fit(2, overrides, stop_after=1).tensors)
    assert (bad.state["step"], bad.state["inf_nan_skip_batches"]) == (2, 1)


@pytest.mark.parametrize(("rank", "layout"), [(1, ()), (0, ("parallel.zero1.size=1",)), (1, PIPELINE)], ids=str)
def test_a_streak_ends_the_run(rank: int, layout: tuple[str, ...], tmp_path: Path) -> None:
    overrides = [FP32, f"log_folder={tmp_path}", "data.total_steps=9", *layout]
    limit = "hybrid_zero_optimizer.max_skipped_steps=3"
    run = fit(2, [*overrides, limit], hooks=[Poison(rank, (1, 3, 4, 5))])
    name = "layers.1.feed_forward.w2.weight"
    assert run.message.startswith(
        "step 5: 3 steps in a row were skipped, since the loss or gradients were inf or NaN "
        f"(first in {name} on rank {rank}). Resume from an older checkpoint"
    )
    assert (run.state["step"], run.state["inf_nan_skip_batches"]) == (6, 4)


@pytest.mark.parametrize("layout", [(), PIPELINE], ids=str)
def test_a_loss_scale_that_is_too_large_falls(layout: tuple[str, ...], tmp_path: Path) -> None:
    """And the run goes on with it after a checkpoint, bit by bit."""
    scaler = [f"{SCALE}=1e12", "grad_scaler.max_scale=1e12", "grad_scaler.backoff_factor=0.00390625"]
    common = [FP16, "grad_scaler.hysteresis=1", *layout, *scaler]
    straight = fit(2, saving(tmp_path / "straight", *common, total=8))
    skipped = straight.state["inf_nan_skip_batches"]
    assert 1 <= skipped <= 4
    assert set(straight.ranks[0].steps) == {8 - skipped}
    first = fit(2, saving(tmp_path / "cut", *common, total=8), stop_after=2)
    assert_goes_on(resume(2, saving(tmp_path / "cut", *common, total=8)), first)
    rest = fit(2, saving(tmp_path / "cut", *common, total=8))
    assert repr(first.log + rest.log) == repr(straight.log)  # norms that overflowed are nan
    assert_same_tensors(rest.tensors, straight.tensors)
