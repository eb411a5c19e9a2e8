"""Validation during training."""

from __future__ import annotations

from collections.abc import Mapping

from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.data.loader import ValidLoader
from internlm.eval import evaluate
from internlm.monitor import MetricsWriter


class Validate(Hook):
    """Validate every ``every`` steps and after the last one."""

    def __init__(
        self, loaders: Mapping[str, ValidLoader], every: int, total_steps: int, writer: MetricsWriter | None
    ) -> None:
        self.loaders, self.every, self.total_steps, self.writer = loaders, every, total_steps, writer

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        done = trainer.state.step
        if self.every and (done % self.every == 0 or done == self.total_steps):
            figures = evaluate(trainer, self.loaders)
            if self.writer and figures:
                self.writer.write(report.step, {"step": report.step, **figures})
