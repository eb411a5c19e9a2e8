"""Now and then: empty the device's cache, look for slow ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from internlm import accelerator
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.utils.logger import get_logger

log = get_logger()


class Upkeep(Hook):
    """Every ``every`` steps (0: never), give unused device memory back and report ranks slower than the mean by
    ``outlier_ratio``."""

    def __init__(self, every: int, outlier_ratio: float, device: torch.device) -> None:
        self.every, self.outlier_ratio, self.device = every, outlier_ratio, device
        self.seconds = 0.0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.seconds += report.fwd_bwd_time
        if self.every and trainer.state.step % self.every == 0:
            accelerator.empty_cache()
            self._report_slow_ranks()
            self.seconds = 0.0

    def _report_slow_ranks(self) -> None:
        all_seconds = torch.zeros(dist.get_world_size(), device=self.device)
        all_seconds[dist.get_rank()] = self.seconds
        dist.all_reduce(all_seconds)
        mean = all_seconds.mean()
        slow = (all_seconds > self.outlier_ratio * mean).nonzero().flatten().tolist()
        if slow and dist.get_rank() == 0:
            shown = ", ".join(f"rank {rank}: {float(all_seconds[rank] / self.every):.3f} s" for rank in slow)
            log.warning(f"slow forward and backward passes (mean {float(mean / self.every):.3f} s a step): {shown}")
