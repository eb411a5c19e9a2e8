"""beta2 as a pure function of the step: max(init, 1 − t^(−c)) with t = 1, 2, … (arXiv 1804.04235, section 7.2)."""

from __future__ import annotations

from dataclasses import dataclass

from internlm.config.schema import AdamConfig, Beta2SchedulerConfig


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
