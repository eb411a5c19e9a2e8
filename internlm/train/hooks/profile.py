"""``--pipeline-trace``: one step of the real schedule, beside the simulated one.

``--profiling``: traces and a memory report.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from internlm.core.context.group import Group
from internlm.core.scheduler.timeline import Record, Timeline, measured_timeline
from internlm.core.scheduler.validate import simulate
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.pictures import chrome_trace, html
from internlm.profiler import StepTrace, memory_report
from internlm.train.hooks.log import own_plan
from internlm.utils.logger import get_logger

log = get_logger()

#: Which step of the run is recorded, from 1: the first ones find caches empty.
RECORDED = 3


class RecordPipeline(Hook):
    """Draw when each stage of a pipeline did what, as measured and as simulated with the costs that were measured:
    ``pipeline.html``, and ``pipeline-trace.json`` for Perfetto or chrome://tracing.

    ``folder``: where to; None on all stages but one of one pipeline. ``stages`` joins those of this rank's.
    """

    def __init__(self, stages: Group, folder: Path | None) -> None:
        self.stages, self.folder = stages, folder
        self.steps, self.start = 0, 0.0

    def before_step(self, trainer: Trainer) -> None:
        self.steps += 1
        if self.steps == RECORDED:
            trainer.scheduler.records = []
            dist.barrier(self.stages.handle)  # from here on all count
            self.start = time.perf_counter()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.scheduler.records is None:
            return
        mine = [record.relative_to(self.start) for record in trainer.scheduler.records]
        trainer.scheduler.records = None
        records: list[list[Record]] = [[]] * self.stages.size
        dist.all_gather_object(records, mine, self.stages.handle)
        if self.folder is not None:
            table = trainer.scheduler.table(report.shape.micro_num)
            measured = measured_timeline(table, records)
            self._draw(self.folder, report.step + 1, simulate(table, measured.costs), measured)

    def _draw(self, folder: Path, step: int, simulated: Timeline, measured: Timeline) -> None:
        both = [("simulated", simulated), ("measured", measured)]
        (folder / "pipeline.html").write_text(html(both, seconds=True), encoding="utf-8")
        (folder / "pipeline-trace.json").write_text(chrome_trace(both), encoding="utf-8")
        figures = ", ".join(f"{name} {t.end * 1e3:.1f} ms, {t.bubble:.1%} idle" for name, t in both)
        log.info(f"pipeline of step {step} in {folder / 'pipeline.html'}: {figures}")

    def after_run(self, trainer: Trainer) -> None:
        if self.steps < RECORDED and self.folder is not None:
            log.warning(f"--pipeline-trace: nothing was recorded, since the run had fewer than {RECORDED} steps")


class ProfileRun(Hook):
    """Trace a few steps and write down where the memory lies, and where it was planned to."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.trace = StepTrace(folder, rank)

    def before_run(self, trainer: Trainer) -> None:
        self.trace.start()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.trace.step()

    def after_run(self, trainer: Trainer) -> None:
        self.trace.stop()
        report = memory_report(trainer.model, trainer.optimizer, own_plan(trainer.model))
        (self.folder / f"memory-rank{self.rank}.txt").write_text(report)
