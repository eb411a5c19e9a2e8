"""beta2 as a pure function of the step: max(init, 1 − t^(−c)) with t = 1, 2, … (arXiv 1804.04235, section 7.2).

Learning rate as a pure function of the step: zero, linear warm-up, and a way down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from internlm.config.schema import AdamConfig, Beta2SchedulerConfig, LRSchedulerConfig


@dataclass(frozen=True)
class Beta2Schedule:
    """Never below ``init``; constant where ``c`` ≤ 0."""

    init: float
    c: float = 0.0
    first_step: int = 0

    def __call__(self, step: int) -> float:
        """beta2 of update ``step``, counted from 0."""
        if self.c <= 0:
            return self.init
        return max(self.init, 1 - (step + self.first_step + 1) ** -self.c)

    @classmethod
    def from_config(cls, beta2: Beta2SchedulerConfig, adam: AdamConfig) -> Beta2Schedule:
        """The schedule that the config describes."""
        init = adam.adam_beta2 if beta2.init_beta2 is None else beta2.init_beta2
        return cls(init, adam.adam_beta2_c if beta2.c is None else beta2.c, first_step=beta2.cur_iter + 1)


#: How much of the way from the peak down to ``eta_min`` is left, after a part of the time between: from 1 to 0. The
#: second argument is the part of that time that the decay of ``wsd`` takes.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, _: (1 + math.cos(math.pi * progress)) / 2,  # arXiv 1608.03983, eq. 5
    "linear": lambda progress, _: 1 - progress,
    "constant": lambda progress, _: 1.0,
    "wsd": lambda progress, decay: min(1.0, (1 - progress) / decay) if decay else 1.0,  # arXiv 2404.06395
}


@dataclass(frozen=True)
class LRSchedule:
    """Zero for ``init_steps``, linear to ``peak`` over ``warmup_steps``, down to ``eta_min`` at ``total_steps`` in one
    of the ``SHAPES``; that of wsd goes down over ``decay_steps``."""

    peak: float
    total_steps: int
    init_steps: int = 0
    warmup_steps: int = 0
    eta_min: float = 0.0
    first_step: int = 0
    shape: str = "cosine"
    decay_steps: int = 0

    def __call__(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0."""
        since = step + self.first_step - self.init_steps
        if since < 0:
            return 0.0
        if since < self.warmup_steps:
            return self.peak * (since + 1) / self.warmup_steps
        length = max(self.total_steps - self.init_steps - self.warmup_steps, 1)
        progress = min((since - self.warmup_steps) / length, 1.0)
        left = SHAPES[self.shape](progress, min(self.decay_steps / length, 1.0))
        return self.eta_min + (self.peak - self.eta_min) * left

    @classmethod
    def from_config(cls, lr: LRSchedulerConfig, adam: AdamConfig) -> LRSchedule:
        """The schedule that the config describes."""
        assert lr.total_steps is not None, "the resolver fills lr_scheduler.total_steps"
        warmup, decay = (int(lr.total_steps * ratio) for ratio in (lr.warmup_ratio, lr.decay_ratio))
        first = lr.last_epoch + 1
        return cls(adam.lr, lr.total_steps, lr.init_steps, warmup, lr.eta_min, first, lr.type, decay)
