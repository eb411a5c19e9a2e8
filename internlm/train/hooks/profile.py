"""``--profiling``: traces and a memory report."""

from __future__ import annotations

from pathlib import Path

from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.profiler import StepTrace, memory_report
from internlm.train.hooks.memory import own_plan


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
