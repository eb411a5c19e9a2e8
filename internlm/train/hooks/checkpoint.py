"""Saving, when it is time to."""

from __future__ import annotations

from internlm.checkpoint import CheckpointManager
from internlm.core.trainer import Hook, StepReport, Trainer


class SaveCheckpoints(Hook):
    """Save every so many steps, at the last step, and when the run is asked to stop."""

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.manager.try_save_checkpoint(trainer.state, force=trainer.stop_requested)
