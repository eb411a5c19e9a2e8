"""Learning rate as a pure function of the step: zero, linear warm-up, cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from internlm.config.schema import AdamConfig, LRSchedulerConfig


@dataclass(frozen=True)
class CosineWithWarmup:
    """Zero for ``init_steps``, linear to ``peak`` over ``warmup_steps``, cosine to ``eta_min`` at ``total_steps``
    (arXiv 1608.03983, eq. 5)."""

    peak: float
    total_steps: int
    init_steps: int = 0
    warmup_steps: int = 0
    eta_min: float = 0.0
    first_step: int = 0

    def __call__(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0."""
        since = step + self.first_step - self.init_steps
        if since < 0:
            return 0.0
        if since < self.warmup_steps:
            return self.peak * (since + 1) / self.warmup_steps
        length = max(self.total_steps - self.init_steps - self.warmup_steps, 1)
        progress = min((since - self.warmup_steps) / length, 1.0)
        return self.eta_min + (self.peak - self.eta_min) * (1 + math.cos(math.pi * progress)) / 2

    @classmethod
    def from_config(cls, lr: LRSchedulerConfig, adam: AdamConfig) -> CosineWithWarmup:
        """The schedule that the config describes."""
        assert lr.total_steps is not None, "the resolver fills lr_scheduler.total_steps"
        warmup = int(lr.total_steps * lr.warmup_ratio)
        return cls(adam.lr, lr.total_steps, lr.init_steps, warmup, lr.eta_min, first_step=lr.last_epoch + 1)
