"""Progress counters of a run, which the trainer counts and checkpoints save."""

from __future__ import annotations

from typing import Any

from internlm.solver.optimizer import SKIPPED, OptimizerStep
from internlm.utils.errors import Problem, UserError, first_of_all_ranks
from internlm.utils.logger import get_logger

log = get_logger()


class TrainState:
    """Progress counters of a run, saved in every checkpoint.

    The trainer counts, in :meth:`Trainer.fit <internlm.core.trainer.Trainer.fit>` and in loops of scripts. Existing
    InternEvo scripts count too (``train_state.step_count += 1``): such an assignment is ignored, with one warning for
    each counter. Only ``step`` can be set.

    Args:
        step: Number of steps done.
        num_consumed_tokens: Number of tokens in these steps, over all ranks, padding included.
        inf_nan_skip_batches: Number of steps skipped because of a non-finite gradient.
    """

    def __init__(self, step: int = 0, num_consumed_tokens: int = 0, inf_nan_skip_batches: int = 0) -> None:
        if not isinstance(step, int):  # existing scripts pass the config and the sampler
            todo = "Use trainer.state, which counts the steps"
            raise UserError(Problem("TrainState", f"expected a number of steps, got {type(step).__name__}", todo))
        self.step = step
        self._tokens, self._skipped, self._samples = num_consumed_tokens, inf_nan_skip_batches, 0
        self._last_update: OptimizerStep | None = None
        self._warned: set[str] = set()

    # -- counters -----------------------------------------------------------------------------------------------------
    @property
    def num_consumed_tokens(self) -> int:
        """Number of tokens in the steps done, over all ranks, padding included."""
        return self._tokens

    @num_consumed_tokens.setter
    def num_consumed_tokens(self, value: int) -> None:
        self._ignore("num_consumed_tokens", value)

    @property
    def inf_nan_skip_batches(self) -> int:
        """Number of steps skipped because of a non-finite gradient, the last one read from the device if need be."""
        if self._last_update is not None:
            self._skipped += not self._last_update.updated
            self._last_update = None
        return self._skipped

    @inf_nan_skip_batches.setter
    def inf_nan_skip_batches(self, value: int) -> None:
        self._ignore("inf_nan_skip_batches", value)

    @property
    def batch_count(self) -> int:
        """Number of batches read, one in each step."""
        return self.step

    @batch_count.setter
    def batch_count(self, value: int) -> None:
        if value != self.step:  # loops of existing scripts set it to the number that it has
            self._ignore("batch_count", value)

    @property
    def step_count(self) -> int:
        """Number of updates: the steps that were not skipped."""
        return self.step - self.inf_nan_skip_batches

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._ignore("step_count", value)

    @property
    def num_consumed_samples_in_epoch(self) -> int:
        """Counter of the script alone, 0 at the start: no checkpoint saves it."""
        return self._samples

    @num_consumed_samples_in_epoch.setter
    def num_consumed_samples_in_epoch(self, value: int) -> None:
        self._samples = value
        message = "this counter of the script is not saved, since the data position follows from the step"
        self._warn("num_consumed_samples_in_epoch", message)

    def _ignore(self, name: str, value: int) -> None:
        self._warn(name, f"ignored the assignment of {value}, since the trainer counts")

    def _warn(self, name: str, message: str) -> None:
        """Log a warning about an assignment to the counter ``name``, once in a run."""
        if name in self._warned:
            return
        self._warned.add(name)
        if first_of_all_ranks(f"train_state.{name}"):
            log.warning(Problem(f"train_state.{name}", message, "Remove the line"))

    # -- for the trainer and checkpoints ------------------------------------------------------------------------------
    def count_step(self, update: OptimizerStep, tokens: int) -> None:
        """Count a step on ``tokens`` tokens with the given result, without waiting for the device to compute it."""
        if self._last_update is not None:
            self._skipped += bool(self._last_update.host_outcome.read_arrived()[SKIPPED])
        self._last_update = update
        self.step += 1
        self._tokens += tokens

    def state_dict(self) -> dict[str, Any]:
        """Return the counters by name."""
        return {name: getattr(self, name) for name in ("step", "num_consumed_tokens", "inf_nan_skip_batches")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters from a result of :meth:`state_dict`."""
        self.step, self._tokens = state["step"], state["num_consumed_tokens"]
        self._skipped, self._last_update = state["inf_nan_skip_batches"], None

    def __repr__(self) -> str:
        return f"TrainState({', '.join(f'{name}={value}' for name, value in self.state_dict().items())})"
