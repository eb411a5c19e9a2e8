"""Loss scale for float16 training, and the check for non-finite gradients.

The loss is multiplied by the scale before the backward pass, and gradients are divided by it after, so that small
gradients do not vanish in float16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). A step whose gradient
overflows is skipped.

From the ``hysteresis``-th overflow on, every overflow multiplies the scale by ``backoff_factor``. After
``growth_interval`` steps in a row without overflow the scale is multiplied by ``growth_factor``, and the count of
overflows is reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from internlm.config.schema import GradScalerConfig
from internlm.solver.optimizer.param_groups import ParamGroup


@dataclass(kw_only=True)
class LossScale:
    """Loss scale, adjusted after each step; with the default values it stays 1."""

    scale: float = 1.0
    growth_interval: int = 1
    growth_factor: float = 1.0
    backoff_factor: float = 1.0
    min_scale: float = 1.0
    max_scale: float = 1.0
    hysteresis: int = 1
    good_steps: int = 0
    """Number of steps in a row without overflow."""
    overflows: int = 0
    """Number of overflows since the scale last grew."""

    @classmethod
    def dynamic(cls, config: GradScalerConfig) -> LossScale:
        """Create the dynamic loss scale for float16 training from the config."""
        fp16 = config.fp16
        return cls(
            scale=fp16.initial_scale,
            growth_interval=fp16.growth_interval,
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            min_scale=fp16.min_scale,
            max_scale=config.max_scale,
            hysteresis=config.hysteresis,
        )

    def update(self, overflow: bool) -> None:
        """Adjust the scale after a step.

        Args:
            overflow: Whether the gradient norm of the step was inf or NaN.
        """
        if overflow:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            # The count of overflows is reset only here, so that overflows between two growths add up.
            self.good_steps = self.overflows = 0
            self.scale = min(self.scale * self.growth_factor, self.max_scale)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint: the scale and both counters."""
        return {key: value for key, value in asdict(self).items() if key in ("scale", "good_steps", "overflows")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.scale = state["scale"]
        self.good_steps, self.overflows = int(state["good_steps"]), int(state["overflows"])


def first_nonfinite_gradient(groups: Sequence[ParamGroup]) -> str | None:
    """Return the name of the first parameter, in model order, with an inf or NaN gradient on this rank, or None."""
    # Whole buffers first: if all gradients are finite, this costs a host sync per group instead of one per parameter.
    suspects = [group for group in groups if not _is_finite(group.grads)]
    found = [
        (position, name) for group in suspects for position, name, grad in group.gradients() if not _is_finite(grad)
    ]
    return min(found)[1] if found else None


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
