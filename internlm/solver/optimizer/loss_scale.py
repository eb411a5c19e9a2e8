"""Loss scale for float16 training, the check for non-finite gradients, and the outcome of a step.

The loss is multiplied by the scale before the backward pass, and gradients are divided by it after, so that small
gradients do not vanish in float16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). A step whose gradient
overflows is skipped.

From the ``hysteresis``-th overflow on, every overflow multiplies the scale by ``backoff_factor``. After
``growth_interval`` steps in a row without overflow the scale is multiplied by ``growth_factor``, and the count of
overflows is reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from internlm.accelerator import HostValues, to_device, to_host
from internlm.config.schema import GradScalerConfig
from internlm.solver.optimizer.param_groups import ParamGroup
from internlm.utils.compat import AsTuple


class LossScale:
    """Loss scale, adjusted after each step; without a config it is constantly 1.

    The scale and its counters stay on the device, so that no step waits for the host to adjust them.

    Args:
        config: Settings of the dynamic loss scale for float16 training. None: the scale is 1 and does not change.
    """

    def __init__(self, config: GradScalerConfig | None = None) -> None:
        self.config = config
        #: Scale, steps in a row without overflow, and overflows since the scale last grew: [3], float64.
        self._state = torch.tensor([config.fp16.initial_scale if config else 1.0, 0, 0], dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        """Move the scale and its counters to ``device``."""
        self._state = to_device(self._state, device)

    @property
    def tensor(self) -> Tensor:
        """Scale of the next step, a float64 scalar on the device; later updates do not change the tensor."""
        return self._state[0]

    @property
    def scale(self) -> float:
        """Scale of the next step, read from the device."""
        return self.state_dict()["scale"]

    def update(self, overflow: Tensor) -> None:
        """Adjust the scale after a step.

        Args:
            overflow: Whether the gradient norm of the step was inf or NaN, a bool scalar.
        """
        if self.config is None:
            return
        config, fp16 = self.config, self.config.fp16
        scale, good_steps, overflows = self._state
        # Without overflow: grow after enough steps. The count of overflows is reset only here, so that overflows
        # between two growths add up.
        grows = good_steps + 1 >= fp16.growth_interval
        grown = torch.stack([(scale * config.growth_factor).clamp(max=config.max_scale), *self._state.new_zeros(2)])
        kept = torch.stack([scale, good_steps + 1, overflows])
        # With overflow: back off, from the hysteresis-th on.
        backs_off = overflows + 1 >= config.hysteresis
        smaller = (scale * config.backoff_factor).clamp(min=fp16.min_scale)
        after_overflow = torch.stack([scale.where(~backs_off, smaller), good_steps * 0, overflows + 1])
        self._state = after_overflow.where(overflow, grown.where(grows, kept))

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint: the scale and both counters."""
        scale, good_steps, overflows = to_host(self._state, "loss scale").tolist()
        return {"scale": scale, "good_steps": int(good_steps), "overflows": int(overflows)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        values = [state["scale"], state["good_steps"], state["overflows"]]
        self._state = to_device(torch.tensor(values, dtype=torch.float64), self._state.device)


class LocalGradientCheck:
    """Check of each parameter's gradient on this rank, before it is reduced; its result stays on the device.

    A NaN in a sum over ranks could not be attributed to one of them.
    """

    def __init__(self, groups: Sequence[ParamGroup]) -> None:
        gradients = sorted((gradient for group in groups for gradient in group.gradients()), key=lambda found: found[0])
        self.names = [name for _, name, _ in gradients]
        is_finite = torch.stack([grad.isfinite().all() for *_, grad in gradients])
        self._first = HostValues(first_false(is_finite), "search for a non-finite gradient")
        self._first.begin_copy()

    def first_nonfinite(self) -> str | None:
        """Return the first parameter, in model order, with an inf or NaN gradient, or None.

        This waits for the device only if it has not checked the gradients yet.
        """
        index = int(self._first.read_arrived())
        return None if index < 0 else self.names[index]


def first_false(is_true: Tensor) -> Tensor:
    """Return the index of the first False in a bool vector, or −1, as a scalar on the device."""
    if not is_true.numel():
        return is_true.new_full((), -1, dtype=torch.long)
    # The first of equal values.
    return is_true.to(torch.uint8).argmin().where(~is_true.all(), -1)


# Entries of an outcome.
NORM, SKIPPED, SCALE, SKIPPED_IN_A_ROW, UPDATES, FIRST_ROW = range(6)


class OptimizerStep(AsTuple):
    """Result of one optimizer step, which unpacks to ``(updated, grad_norm)``.

    It stays on the device until one of its properties is used for the first time, which is a host sync.

    Args:
        outcome: [6], float64: gradient norm, whether the step was skipped, loss scale, number of steps skipped in a
            row, number of updates so far, and index of the first row of this rank's reduced gradients that is not
            finite, or −1.
        local_gradients: Check of this rank's gradients, if one was made.
        is_last_chance: Whether the run ends if this step was skipped.
    """

    def __init__(
        self, outcome: Tensor, local_gradients: LocalGradientCheck | None = None, is_last_chance: bool = False
    ) -> None:
        self.host_outcome = HostValues(outcome, "gradient norm")
        self.local_gradients, self.is_last_chance = local_gradients, is_last_chance

    def as_tuple(self) -> tuple[bool, float]:
        """Return ``(updated, grad_norm)``."""
        return self.updated, self.grad_norm

    @property
    def updated(self) -> bool:
        """Whether the parameters were updated; False if the step was skipped."""
        return not self.host_outcome.read()[SKIPPED]

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping; inf or NaN if the step was skipped, unless only the loss was."""
        return float(self.host_outcome.read()[NORM])

    @property
    def loss_scale(self) -> float:
        """Loss scale by which the loss of this step was multiplied."""
        return float(self.host_outcome.read()[SCALE])

    @property
    def skipped_in_a_row(self) -> int:
        """Number of steps skipped in a row, including this one."""
        return int(self.host_outcome.read()[SKIPPED_IN_A_ROW])

    @property
    def updates(self) -> int:
        """Number of steps so far that were not skipped."""
        return int(self.host_outcome.read()[UPDATES])
