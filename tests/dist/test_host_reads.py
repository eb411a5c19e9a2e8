"""Host syncs: in every mode, a step that is logged is read from the device once."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm.accelerator import host_reads
from internlm.core.trainer import Hook, StepReport, Trainer
from tests.dist.test_pipeline_models import build_chain
from tests.dist.whole_runs import fit

assert build_chain  # imported on the workers, to register its model
FP32, FP16 = ("model.dtype=torch.float32",), ("model.dtype=torch.float16",)
PIPELINE = ("parallel.pipeline.size=2", "model.num_layers=4")
CHUNKS = (*PIPELINE, "model.num_chunks=2")
ISP = ("parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.tensor.size=2", "parallel.weight.overlap=True")
ZERO = tuple(f"hybrid_zero_optimizer.overlap_sync_{what}=True" for what in ("grad", "param"))
SCALE = tuple(f"grad_scaler.{key}" for key in ("fp16.initial_scale=1e12", "max_scale=1e12", "hysteresis=1"))

#: Overrides for two ranks, with the number of steps in which more is read.
ROWS: dict[str, tuple[tuple[str, ...], int]] = {
    "fp16 with overflows, overlapped": ((*FP16, *ZERO, *SCALE, "grad_scaler.backoff_factor=0.00390625"), 0),
    "every step may end the run": ((*FP32, "hybrid_zero_optimizer.max_skipped_steps=1"), 0),
    "fully sharded": ((*FP32, "parallel.zero1.fsdp=True"), 0),
    "isp, overlapped": ((*FP32, *ISP, "parallel.weight.memory_pool=True"), 0),
    "interleaved": ((*FP32, *CHUNKS), 0),
    "zbv, fp16": ((*FP16, *CHUNKS, "parallel.pipeline.mode=ZBV"), 0),
    # The headers of the first step.
    "1f1b, a model without hidden_like": ((*FP32, *PIPELINE, "model_type=CHAIN", "data.use_packed_dataset=False"), 1),
}


class _OneRead(Hook):
    """Assert that each step is read once, after the first ``learning`` ones; with the hooks that follow this one."""

    def __init__(self, learning: int) -> None:
        self.learning, self.step = learning, -1
        self.before = host_reads()

    def before_step(self, trainer: Trainer) -> None:
        self._check()
        self.before = host_reads()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.step = report.step

    def after_run(self, trainer: Trainer) -> None:
        self._check()

    def _check(self) -> None:
        if self.step >= self.learning:
            assert host_reads() - self.before == {"metrics of a step": 1}, f"step {self.step}"


@pytest.mark.parametrize("row", ROWS)
def test_a_step_is_read_once(row: str, tmp_path: Path) -> None:
    overrides, learning = ROWS[row]
    common = (f"log_folder={tmp_path}", "data.total_steps=3", "data.micro_num=4")
    run = fit(2, (*common, *overrides), hooks=[_OneRead(learning)])
    assert run.state["step"] == 3
    assert (run.state["inf_nan_skip_batches"] > 0) is ("overflows" in row)
