"""The dynamic loss scale of float16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2), a state machine without
tensors.

The loss is multiplied by the scale before the backward pass, and gradients are divided by it, so that small ones don't
vanish in float16. A step whose gradient overflows is skipped; after ``hysteresis`` of them the scale falls by
``backoff_factor``, and at every further one, until it grows again by ``growth_factor``, after ``growth_interval`` steps
in a row without overflow.

Which gradient is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from internlm.config.schema import GradScalerConfig
from internlm.solver.optimizer.param_groups import ParamGroup


@dataclass
class LossScale:
    """The scale, and what decides when it changes; 1 for ever, as it is made."""

    scale: float = 1.0
    growth_interval: int = 1
    growth_factor: float = 1.0
    backoff_factor: float = 1.0
    min_scale: float = 1.0
    max_scale: float = 1.0
    hysteresis: int = 1
    good_steps: int = 0  # in a row
    overflows: int = 0  # since the scale last grew

    @classmethod
    def dynamic(cls, config: GradScalerConfig) -> LossScale:
        """That of float16."""
        fp16 = config.fp16
        return cls(
            fp16.initial_scale,
            fp16.growth_interval,
            config.growth_factor,
            config.backoff_factor,
            fp16.min_scale,
            config.max_scale,
            config.hysteresis,
        )

    def update(self, overflow: bool) -> None:
        """After a step: whether its gradient was inf or nan."""
        if overflow:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.good_steps = self.overflows = 0
            self.scale = min(self.scale * self.growth_factor, self.max_scale)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds of it."""
        return {key: value for key, value in asdict(self).items() if key in ("scale", "good_steps", "overflows")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.scale = state["scale"]
        self.good_steps, self.overflows = int(state["good_steps"]), int(state["overflows"])


def first_nonfinite_gradient(groups: Sequence[ParamGroup]) -> str | None:
    """The first parameter, in the order of the model, whose gradient on this rank is inf or nan somewhere."""
    suspects = [group for group in groups if not _finite(group.grads)]
    bad = [(place, name) for group in suspects for place, name, grad in group.gradients() if not _finite(grad)]
    return min(bad)[1] if bad else None


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
