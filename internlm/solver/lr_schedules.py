"""Schedules of the learning rate and of beta2, as pure functions of the step.

Pure functions have no state to save in a checkpoint: a resumed run needs only the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from internlm.config.schema import AdamConfig, Beta2SchedulerConfig, LRSchedulerConfig
from internlm.config.schema.fields import floor_share
from internlm.config.schema.optim import LRShape
from internlm.utils.compat import FollowsRun

#: Decay factors, from 1 at the peak to 0 at ``eta_min``. Arguments: the elapsed fraction of the steps after warm-up,
#: and the fraction of these steps in which ``wsd`` decays.
SHAPES: dict[LRShape, Callable[[float, float], float]] = {
    "cosine": lambda progress, _: (1 + math.cos(math.pi * progress)) / 2,  # arXiv 1608.03983, eq. 5
    "linear": lambda progress, _: 1 - progress,
    "constant": lambda progress, _: 1.0,
    "wsd": lambda progress, decay: min(1.0, (1 - progress) / decay) if decay else 1.0,  # arXiv 2404.06395
}


@dataclass(frozen=True, kw_only=True)
class LRSchedule(FollowsRun):
    """Learning-rate schedule: zero, linear warm-up to ``peak``, then decay to ``eta_min`` at ``total_steps``."""

    peak: float
    total_steps: int
    init_steps: int = 0
    """Number of steps at a rate of zero, before warm-up."""
    warmup_steps: int = 0
    eta_min: float = 0.0
    first_step: int = 0
    """Step of the schedule that corresponds to step 0 of the run."""
    shape: LRShape = "cosine"
    decay_steps: int = 0
    """Number of steps at the end of the schedule over which the shape ``wsd`` decays the learning rate."""

    def __call__(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        since = step + self.first_step - self.init_steps
        if since < 0:
            return 0.0
        if since < self.warmup_steps:
            # Counted from 1: a rate of zero would waste the first update after init_steps.
            return self.peak * (since + 1) / self.warmup_steps
        length = max(self.total_steps - self.init_steps - self.warmup_steps, 1)
        progress = min((since - self.warmup_steps) / length, 1.0)
        left = SHAPES[self.shape](progress, min(self.decay_steps / length, 1.0))
        return self.eta_min + (self.peak - self.eta_min) * left

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of the last update, in a list as torch's schedulers do."""
        return [self.last_value()]

    @classmethod
    def from_config(cls, lr: LRSchedulerConfig, adam: AdamConfig) -> LRSchedule:
        """Create the schedule from the config's ``lr_scheduler`` and ``adam`` sections."""
        assert lr.total_steps is not None, "the resolver fills lr_scheduler.total_steps"
        return cls(
            peak=adam.lr,
            total_steps=lr.total_steps,
            init_steps=lr.init_steps,
            warmup_steps=floor_share(lr.warmup_ratio, lr.total_steps),
            eta_min=lr.eta_min,
            first_step=lr.last_epoch + 1,  # last_epoch is -1 in a run from the start, as in torch's schedulers
            shape=lr.type,
            decay_steps=floor_share(lr.decay_ratio, lr.total_steps),
        )


@dataclass(frozen=True)
class Beta2Schedule(FollowsRun):
    """Schedule of beta2: max(init, 1 − t^(−c)), t = 1, 2, … (arXiv 1804.04235, section 7.2); ``init`` if c ≤ 0."""

    init: float
    c: float = 0.0
    first_step: int = 0

    def __call__(self, step: int) -> float:
        """Return beta2 of update ``step``, counted from 0."""
        if self.c <= 0:
            return self.init
        return max(self.init, 1 - (step + self.first_step + 1) ** -self.c)

    def get_beta2(self) -> float:
        """Return beta2 of the last update."""
        return self.last_value()

    @classmethod
    def from_config(cls, beta2: Beta2SchedulerConfig, adam: AdamConfig) -> Beta2Schedule:
        """Create the schedule from the config's ``beta2_scheduler`` and ``adam`` sections."""
        return cls(
            init=adam.adam_beta2 if beta2.init_beta2 is None else beta2.init_beta2,
            c=adam.adam_beta2_c if beta2.c is None else beta2.c,
            first_step=beta2.cur_iter + 1,
        )
