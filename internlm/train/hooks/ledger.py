"""``--ledger``: what was said between ranks."""

from __future__ import annotations

from internlm.core.parallel.ledger import LEDGER, table
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.utils.logger import get_logger

log = get_logger()


class ReportTraffic(Hook):
    """At the end of the run, a table of the collectives of its steps and the bytes that this rank sent by them."""

    def __init__(self) -> None:
        self.before = LEDGER.snapshot()
        self.steps = 0

    def before_run(self, trainer: Trainer) -> None:
        self.before = LEDGER.snapshot()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.steps += 1

    def after_run(self, trainer: Trainer) -> None:
        traffic = LEDGER.since(self.before)
        log.info(f"sent by this rank in {self.steps} steps\n{table(traffic, max(self.steps, 1))}")
