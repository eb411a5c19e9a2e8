"""Trainer: a training step, the loop over steps, and hooks named by their position in the loop."""

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
    """Protocol of an iterable of batches that can start at any step."""

    def seek(self, step: int) -> None:
        """Start the next iterator at the batch of ``step``."""

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass
class TrainState:
    """Progress of a run, saved in every checkpoint."""

    step: int = 0  # steps done
    num_consumed_tokens: int = 0  # over all ranks, pads included
    inf_nan_skip_batches: int = 0  # steps skipped because of a non-finite gradient

    def state_dict(self) -> dict[str, Any]:
        """Return the counters by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters from a result of :meth:`state_dict`."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of this rank's share of a batch."""

    micro_num: int
    tokens: int  # pads included
    sequences: int
    largest_length: int  # tokens of the longest sequence
    largest_batch: int  # sequences of the fullest micro-batch
    smallest_batch: int

    @classmethod
    def of(cls, batch: dict[str, Any]) -> BatchShape:
        """Measure ``batch``: its ``input_ids``, and its ``cu_seqlens`` where it is packed."""
        ids = batch["input_ids"]
        boundaries = batch.get("cu_seqlens")
        if boundaries is None:  # [micro_num, micro_bsz, seq_len]
            micro_num, micro_bsz, seq_len = ids.shape
            counts, largest_length = [micro_bsz] * micro_num, seq_len
        else:  # on the host, so no host sync
            counts = [len(cu_seqlens) - 1 for cu_seqlens in boundaries]
            largest_length = max(int(cu_seqlens.diff().max()) for cu_seqlens in boundaries)
        return cls(
            micro_num=len(ids),
            tokens=ids.numel(),
            sequences=sum(counts),
            largest_length=largest_length,
            largest_batch=max(counts),
            smallest_batch=min(counts),
        )


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Results and times of one training step, for hooks."""

    step: int  # counted from 0
    result: StepResult
    update: OptimizerStep
    shape: BatchShape
    lr: float
    beta2: float
    fwd_bwd_time: float  # seconds
    data_time: float  # seconds spent waiting for the batch
    step_time: float  # seconds from fetching the batch to the end of the update


class Hook:
    """Base class of hooks, whose methods are named by their position in the loop; override those you need."""

    def before_run(self, trainer: Trainer) -> None:
        """Run once, after resuming and before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Run before the batch of a step is fetched."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Run after the update; ``trainer.state`` already counts the step."""

    def after_run(self, trainer: Trainer) -> None:
        """Run once after the last step, also if the run stops early or fails."""


class Trainer:
    """Training of a model, step by step, with optimizer, pipeline scheduler, and lr and beta2 schedules.

    Call ``zero_grad``, ``execute_schedule`` and ``step`` in a custom loop, or :meth:`fit` for the whole loop.
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

    # -- one step -----------------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.model.eval()

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self.optimizer.zero_grad()

    def execute_schedule(
        self, data_iter: Iterator[Batch], after_backward: Callable[[], None] | None = None, **options: bool
    ) -> StepResult:
        """Run the next batch of ``data_iter``.

        Args:
            data_iter: Iterator over (inputs, labels) of all micro-batches of a step.
            after_backward: Function called when this rank's gradients are complete.
            options: Flags of :meth:`Scheduler.forward_backward_step`.
        """
        training = TrainingStep(
            step=self.state.step, loss_scale=self.optimizer.loss_scale.scale, after_backward=after_backward
        )
        return self.scheduler.forward_backward_step(self, data_iter, training=training, **options)

    def step(self) -> OptimizerStep:
        """Update the parameters with this step's learning rate and beta2, and count the step.

        Raises:
            UserError: Too many steps in a row were skipped because of non-finite gradients.
        """
        update = self.optimizer.step(self.lr_schedule(self.state.step), self.beta2_schedule(self.state.step))
        self.state.step += 1
        self.state.inf_nan_skip_batches += not update.updated
        if update.skipped_in_a_row >= self.optimizer.config.max_skipped_steps:
            raise UserError(_too_many_skipped_steps(self.state.step - 1, update))
        return update

    # -- the loop -----------------------------------------------------------------------------------------------------
    def train_step(self, batches: Iterator[Batch]) -> StepReport:
        """Run one step: fetch a batch, forward and backward, update."""
        # Read the step before self.step() increments it.
        step, start = self.state.step, time.perf_counter()
        batch = next(batches)
        fetched = time.perf_counter()
        # The number of micro-batches tells the optimizer when the gradients of a bucket are complete.
        self.optimizer.begin_step(micro_batches=len(batch[1]))
        result = self.execute_schedule(iter([batch]), after_backward=self.optimizer.begin_reduction)
        # The device is asynchronous: without a synchronisation before reading the clock, the times would be those of
        # kernel launches.
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
        """Train from ``state.step`` to ``total_steps``, or until a hook sets ``stop_requested``.

        Args:
            loader: Loader of the run's batches.
            total_steps: Number of steps of the run, including those before a resume.
            hooks: Hooks, called in this order before and after each step, and in reverse order at the end.
        """
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
            # Later hooks may depend on earlier ones, as with nested contexts.
            for hook in reversed(hooks):
                hook.after_run(self)
        # No forward waits for the overlapped all-gathers of the last update.
        self.optimizer.gather_parameters()
        return self.state


def _too_many_skipped_steps(step: int, update: OptimizerStep) -> Problem:
    """Describe the last of too many skipped steps, with the first parameter that has a non-finite gradient.

    This is a collective: all ranks skip the same steps, so all of them call it.
    """
    names: list[str | None] = [update.nonfinite_gradient]
    if dist.is_initialized():
        names *= dist.get_world_size()
        dist.all_gather_object(names, update.nonfinite_gradient)
    nonfinite = [(rank, name) for rank, name in enumerate(names) if name]
    if nonfinite:
        where = f"first in {nonfinite[0][1]} on rank {nonfinite[0][0]}"
    else:
        where = "no local gradient is non-finite; the reduced sum overflowed"
    message = f"{update.skipped_in_a_row} steps in a row were skipped, since gradients were inf or nan ({where})"
    todo = "Resume from an older checkpoint with a lower learning rate, or check the data of these steps"
    return Problem(f"step {step}", message, todo)
