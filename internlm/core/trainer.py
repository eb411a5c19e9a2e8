"""The trainer: a step, the loop over steps, and hooks named by their position in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from internlm import accelerator
from internlm.core.scheduler import Scheduler, StepResult, TrainingStep
from internlm.solver.optimizer import HybridZeroOptimizer, OptimizerStep
from internlm.utils.errors import Problem, UserError

Batch = tuple[dict[str, Any], Tensor]
Schedule = Callable[[int], float]


class Loader(Protocol):
    """Batches of a run, from any step on."""

    def seek(self, step: int) -> None: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass
class TrainState:
    """How far the run is; part of every checkpoint."""

    step: int = 0  # steps done
    num_consumed_tokens: int = 0  # over all ranks, pads included
    inf_nan_skip_batches: int = 0  # steps whose update was left out

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])


@dataclass(frozen=True)
class BatchShape:
    """Sizes of this rank's part of a batch."""

    micro_num: int
    tokens: int  # pads included
    sequences: int
    largest_length: int  # tokens of the longest sequence
    largest_batch: int  # sequences of the fullest micro-batch
    smallest_batch: int

    @classmethod
    def of(cls, batch: dict[str, Any]) -> BatchShape:
        """Measured from ``batch``."""
        ids = batch["input_ids"]
        bounds = batch.get("cu_seqlens")
        if bounds is None:  # [micro_num, micro_bsz, seq_len]
            micro_num, per_micro, length = ids.shape
            return cls(micro_num, ids.numel(), micro_num * per_micro, length, per_micro, per_micro)
        counts = [len(cu) - 1 for cu in bounds]
        longest = max(int(cu.diff().max()) for cu in bounds)
        return cls(len(ids), ids.numel(), sum(counts), longest, max(counts), min(counts))


@dataclass(frozen=True)
class StepReport:
    """All there is to say about one training step."""

    step: int  # counted from 0
    result: StepResult
    update: OptimizerStep
    shape: BatchShape
    lr: float
    beta2: float
    fwd_bwd_time: float  # seconds
    data_time: float  # seconds spent waiting for the batch
    step_time: float  # seconds from the request for the batch to the end of the update


class Hook:
    """Something done beside training. Override the positions you need."""

    def before_run(self, trainer: Trainer) -> None:
        """Once, after resuming and before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Before the batch of a step is fetched."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """After the update; ``trainer.state`` already counts the step."""

    def after_run(self, trainer: Trainer) -> None:
        """Once, after the last step, also where the run ends early or by an error."""


class Trainer:
    """Model, optimizer, schedule of micro-batches and schedules of lr and beta2, driven step by step.

    Use it by hand (``zero_grad``, ``execute_schedule``, ``step``), or let :meth:`fit` run the loop.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: HybridZeroOptimizer,
        scheduler: Scheduler,
        lr_schedule: Schedule,
        beta2_schedule: Schedule,
        state: TrainState | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.lr_schedule, self.beta2_schedule = lr_schedule, beta2_schedule
        self.state = state or TrainState()
        self.stop_requested = False

    # -- one step, by hand --------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.model.eval()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def execute_schedule(
        self, data_iter: Iterator[Batch], after_backward: Callable[[], None] | None = None, **options: bool
    ) -> StepResult:
        """Run the next batch of ``data_iter``.

        Args:
            data_iter: yields (inputs, labels) of all micro-batches of a step.
            after_backward: called when this rank's gradients are complete.
            options: flags of the scheduler's ``forward_backward_step``.
        """
        training = TrainingStep(
            step=self.state.step, loss_scale=self.optimizer.loss_scale.scale, after_backward=after_backward
        )
        return self.scheduler.forward_backward_step(self, data_iter, training=training, **options)

    def step(self) -> OptimizerStep:
        """Update the parameters with this step's learning rate and beta2, and count the step. Raises
        :class:`~internlm.utils.errors.UserError` where too many in a row had to be skipped."""
        update = self.optimizer.step(self.lr_schedule(self.state.step), self.beta2_schedule(self.state.step))
        self.state.step += 1
        self.state.inf_nan_skip_batches += not update.updated
        if update.skipped_in_a_row >= self.optimizer.config.max_skipped_steps:
            raise UserError(given_up(self.state.step - 1, update))
        return update

    # -- the loop -----------------------------------------------------------------------------------------------------
    def train_step(self, batches: Iterator[Batch]) -> StepReport:
        """Fetch a batch, run it forward and backward, update."""
        step, start = self.state.step, time.perf_counter()
        batch = next(batches)
        fetched = time.perf_counter()
        self.optimizer.begin_step(micro_batches=len(batch[1]))
        result = self.execute_schedule(iter([batch]), after_backward=self.optimizer.begin_reduction)
        accelerator.synchronize()
        computed = time.perf_counter()
        update = self.step()
        accelerator.synchronize()
        shape = BatchShape.of(batch[0])
        self.state.num_consumed_tokens += shape.tokens * self.scheduler.data_group.size
        return StepReport(
            step=step,
            result=result,
            update=update,
            shape=shape,
            lr=self.lr_schedule(step),
            beta2=self.beta2_schedule(step),
            fwd_bwd_time=computed - fetched,
            data_time=fetched - start,
            step_time=time.perf_counter() - start,
        )

    def fit(self, loader: Loader, total_steps: int, hooks: Sequence[Hook] = ()) -> TrainState:
        """Train from ``state.step`` to ``total_steps``, or until a hook sets ``stop_requested``."""
        loader.seek(self.state.step)
        batches = iter(loader)
        self.train()
        try:
            for hook in hooks:
                hook.before_run(self)
            while self.state.step < total_steps and not self.stop_requested:
                for hook in hooks:
                    hook.before_step(self)
                report = self.train_step(batches)
                for hook in hooks:
                    hook.after_step(self, report)
        finally:
            for hook in reversed(hooks):
                hook.after_run(self)
        self.optimizer.gather_parameters()
        return self.state


def given_up(step: int, update: OptimizerStep) -> Problem:
    """What to say of the last of too many steps that were skipped. All ranks must ask."""
    found: list[str | None] = [update.nonfinite_gradient]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, update.nonfinite_gradient)
    bad = [(rank, name) for rank, name in enumerate(found) if name]
    where = f"first in {bad[0][1]} on rank {bad[0][0]}" if bad else "in no rank's own: their sum is too large"
    what = f"{update.skipped_in_a_row} steps in a row were skipped, since gradients were inf or nan ({where})"
    todo = "Go on from an older checkpoint with a lower learning rate, or look at the data of these steps"
    return Problem(f"step {step}", what, todo)
