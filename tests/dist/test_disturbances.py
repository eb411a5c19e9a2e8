"""Faults beside training: webhooks that are down or slow, steps that are not finite, disks that are full."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.monitor import send_alert_message, webhook
from tests.dist.test_precision import Poison
from tests.dist.whole_runs import Outcome, assert_same_tensors, fit, resume, saving
from tests.harness.webhooks import answering, dribbling, silent, webhook_server

TOKEN = "t0ken"


# -- webhooks


@dataclass
class _Alerting(Hook):
    """Send an alert to each address in each step, and assert that the calls take less than 5 % of a run's time."""

    addresses: tuple[str, ...]
    seconds: float = 0.0

    def before_run(self, trainer: Trainer) -> None:
        self.limits = {name: vars(webhook)[name] for name in ("EXCHANGE_SECONDS", "FLUSH_SECONDS")}
        vars(webhook).update(dict.fromkeys(self.limits, 0.2))
        self.start = time.perf_counter()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        start = time.perf_counter()
        for address in self.addresses:
            send_alert_message(address, message=f"step {report.step}")
        self.seconds += time.perf_counter() - start

    def after_run(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self.start
        webhook.SENDER.flush()
        vars(webhook).update(self.limits)
        assert self.seconds < 0.05 * seconds


def test_training_takes_no_notice_of_webhooks_that_are_down_slow_or_fail() -> None:
    with ExitStack() as servers:
        down = servers.enter_context(answering(silent)).replace("127.0.0.1", "127.0.0.2")
        slow, dribbles = (servers.enter_context(answering(answer)) for answer in (silent, dribbling))
        fails = servers.enter_context(webhook_server(500)).address
        addresses = tuple(f"{address}/{TOKEN}" for address in (down, slow, dribbles, fails))
        run = fit(2, ["data.total_steps=20"], hooks=[_Alerting(addresses)])
    assert run.state["step"] == 20
    warnings = [text for rank in run.ranks for text in rank.warnings]
    for reason in ("Connection refused", "no response within 0.2 s", "alerts are dropped"):
        assert any(reason in text for text in warnings), warnings
    assert TOKEN not in "".join(warnings)


def test_no_file_of_a_run_holds_the_token_and_it_resumes(tmp_path: Path) -> None:
    with webhook_server() as hook:
        alert = f"monitor.alert.feishu_alert_address={hook.address}/{TOKEN}"
        run = saving(tmp_path, "monitor.alert.enable_feishu_alert=True", alert)
        assert fit(1, run).state["step"] == 6
        assert len(hook.texts) == 2
        assert resume(1, run).message.startswith("resumed from ")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


# -- steps that are not finite

FP32, FP16, FSDP = "model.dtype=torch.float32", "model.dtype=torch.float16", "parallel.zero1.fsdp=True"
PIPELINE = ("parallel.pipeline.size=2", "data.micro_num=4")
MTP = ("parallel.tensor.mode=mtp", "parallel.tensor.size=2")
OVERLAP = tuple(f"hybrid_zero_optimizer.overlap_sync_{each}=True" for each in ("grad", "param"))
W2 = "layers.1.feed_forward.w2.weight"


@dataclass
class _BadLoss(Hook):
    """Make the forward pass of one rank NaN in some steps."""

    rank: int
    steps: tuple[int, ...]

    def before_run(self, trainer: Trainer) -> None:
        def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
            is_bad = dist.get_rank() == self.rank and trainer.state.step in self.steps
            return output * math.nan if is_bad else None

        if "layers.1.attention" in dict(trainer.model.named_modules()):
            trainer.model.get_submodule("layers.1.attention").register_forward_hook(spoil)


def skip_warnings(run: Outcome) -> list[str]:
    """Return the warnings about skipped steps on all ranks."""
    return [text for rank in run.ranks for text in rank.warnings if "was skipped" in text]


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        ((), "loss on rank 1, "),
        (OVERLAP, "loss on rank 1, "),
        ((FSDP,), "loss on rank 1, "),
        (PIPELINE, "loss on rank 1, "),
        (MTP, "loss on 2 of 2 ranks, first rank 0, "),
    ],
    ids=str,
)
def test_a_loss_that_is_nan_on_one_rank_skips_the_step_everywhere_with_a_warning(
    layout: tuple[str, ...], where: str, tmp_path: Path
) -> None:
    overrides = [FP32, f"log_folder={tmp_path}", "data.total_steps=6", *layout]
    bad = fit(2, overrides, stop_after=2, hooks=[_BadLoss(1, (1,))])
    assert_same_tensors(bad.tensors, fit(2, overrides, stop_after=1).tensors)
    assert (bad.state["step"], bad.state["inf_nan_skip_batches"]) == (2, 1)
    (warning,) = skip_warnings(bad)
    assert warning.startswith(f"step 1 was skipped, since the loss or gradients were inf or NaN ({where}first in ")
    assert warning.endswith("): gradient norm nan. 1 in a row; 64 end the run")


@pytest.mark.parametrize("layout", [(), OVERLAP, ("parallel.zero1.size=1",), MTP, PIPELINE], ids=str)
def test_each_skipped_step_gives_one_warning_with_the_parameter_and_in_a_row_the_rank(
    layout: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = [FP32, f"log_folder={tmp_path}", "data.total_steps=7", *layout]
    run = fit(2, overrides, hooks=[Poison(1, (1, 3, 4, 6))])
    assert (run.state["step"], run.state["inf_nan_skip_batches"]) == (7, 4)
    warnings = skip_warnings(run)
    for warning, step, in_a_row in zip(warnings, (1, 3, 4, 6), (1, 1, 2, 1), strict=True):
        assert warning.startswith(f"step {step} was skipped, since the loss or gradients were inf or NaN (first in ")
        assert warning.endswith(f". {in_a_row} in a row; 64 end the run")
        if in_a_row == 1:
            named = warning.partition(" (first in the reduced gradient of ")[2].partition(")")[0]
            assert W2 in named.split(" or ")
        else:
            assert f" (first in {W2} on rank 1): gradient norm " in warning


def test_a_loss_of_nan_step_after_step_ends_the_run(tmp_path: Path) -> None:
    overrides = [f"log_folder={tmp_path}", "data.total_steps=9", "hybrid_zero_optimizer.max_skipped_steps=2"]
    run = fit(2, [FP32, *overrides], hooks=[_BadLoss(1, (1, 3, 4))])
    assert run.message.startswith(
        "step 4: 2 steps in a row were skipped, since the loss or gradients were inf or NaN (loss on rank 1, first in "
    )
    assert " on rank 1). Resume from an older checkpoint" in run.message
    assert (run.state["step"], run.state["inf_nan_skip_batches"]) == (5, 3)
    assert [text.split()[1] for text in skip_warnings(run)] == ["1", "3"]


def test_the_warning_of_an_overflow_in_float16_has_the_loss_scale(tmp_path: Path) -> None:
    scaler = [f"grad_scaler.{key}" for key in ("fp16.initial_scale=1e12", "max_scale=1e12", "hysteresis=1")]
    run = fit(2, [FP16, f"log_folder={tmp_path}", "data.total_steps=2", *scaler])
    first, second = skip_warnings(run)
    assert ", loss scale 1e+12. 1 in a row; " in first
    assert ", loss scale 5e+11. 2 in a row; " in second
