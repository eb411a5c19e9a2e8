"""Trainer: the training step, the loop over steps, and hooks named by their position in the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from internlm import accelerator
from internlm.core.nonfinite import find_on_all_ranks, too_many_skipped_steps
from internlm.core.scheduler import Scheduler, StepResult, TrainingStep
from internlm.core.scheduler.loss import LOSS
from internlm.core.train_state import TrainState as TrainState
from internlm.data.batch_plan import BatchPlan
from internlm.data.loader import TrainLoader
from internlm.solver.optimizer import HybridZeroOptimizer, OptimizerStep
from internlm.utils.compat import FollowsRun, OlderResult, ReplacedNames
from internlm.utils.errors import Problem, UserError, naming_lost_ranks
from internlm.utils.progress import enter_phase

Batch = tuple[dict[str, Any], Tensor]
Schedule = Callable[[int], float]


class Loader(Protocol):
    """Protocol for an iterable of batches that can start at any step."""

    def seek(self, step: int) -> None:
        """Start the next iterator at the batch of ``step``."""

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of the batch that this rank reads in one step."""

    micro_num: int  # micro-batches
    tokens: int  # padding included
    sequences: int
    largest_length: int  # tokens of the longest sequence
    largest_batch: int  # sequences of the micro-batch with the most
    smallest_batch: int  # sequences of the micro-batch with the fewest

    @classmethod
    def of(cls, batch: dict[str, Any]) -> BatchShape:
        """Compute the sizes of ``batch`` from its ``input_ids`` and, if it is packed, its ``cu_seqlens``."""
        ids = batch["input_ids"]
        boundaries = batch.get("cu_seqlens")
        if boundaries is None:  # [micro_num, micro_bsz, seq_len]
            micro_num, micro_bsz, seq_len = ids.shape
            counts, largest_length = [micro_bsz] * micro_num, seq_len
        else:  # on the host, so no host sync
            counts = [len(cu_seqlens) - 1 for cu_seqlens in boundaries]
            lengths = [end - start for cu_seqlens in boundaries for start, end in pairwise(cu_seqlens.tolist())]
            largest_length = max(lengths)
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
    """Results and times of one training step, for hooks.

    Results and times of the device are read when they are used first, which is a host sync; :meth:`read` reads all of
    them at once.
    """

    step: int  # counted from 0
    result: StepResult
    update: OptimizerStep
    shape: BatchShape
    lr: float
    beta2: float
    data_time: float  # seconds spent waiting for the batch
    start: accelerator.Mark  # before the batch is fetched
    fetched: accelerator.Mark  # before the first forward pass
    computed: accelerator.Mark  # after the last backward pass
    end: accelerator.Mark  # after the update

    def read(self) -> None:
        """Read the results of the step from the device, with one host sync."""
        accelerator.read_together(self.result.host_sums, self.update.host_outcome, why="metrics of a step")

    @property
    def fwd_bwd_time(self) -> float:
        """Seconds of the forward and backward passes."""
        return self.computed.seconds_since(self.fetched)

    @property
    def step_time(self) -> float:
        """Seconds from fetching the batch to the end of the update."""
        return self.end.seconds_since(self.start)


class Hook:
    """Base class of hooks, whose methods are named by their position in the training loop and do nothing by default."""

    def before_run(self, trainer: Trainer) -> None:
        """Run once, after resuming and before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Run before the batch of a step is fetched."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Run after the optimizer step, when ``trainer.state`` already counts the step."""

    def after_run(self, trainer: Trainer) -> None:
        """Run once after the last step, even if the run stops early or fails."""


class Trainer(ReplacedNames, OlderResult):
    """Trainer of a model, with its optimizer, pipeline scheduler, and learning-rate and beta2 schedules.

    Call :meth:`zero_grad`, :meth:`execute_schedule` and :meth:`step` in a custom loop, or :meth:`fit` for the whole
    loop.
    """

    replaced: ClassVar[Mapping[str, str]] = {"backward": HybridZeroOptimizer.replaced["backward"]}

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
        for schedule in (lr_schedule, beta2_schedule):
            if isinstance(schedule, FollowsRun):
                schedule.follow(self.state)
        self.stop_requested = False
        """Whether the loop ends after this step; a hook may set it."""
        self.save_requested = False
        """Whether a checkpoint is saved after this step, and the loop goes on; a hook may set it."""
        # Of the calls of execute_schedule since the last update: sums over all ranks, and losses of this rank.
        self._sums: list[accelerator.HostValues] = []
        self._local_losses: list[accelerator.HostValues] = []
        self._tokens = 0  # of the batches since the last update, over all ranks, padding included
        self._plan: BatchPlan | None = None  # of the loader in fit()

    @property
    def engine(self) -> Trainer:
        """This trainer, which existing scripts reach by this name: it has the model and the optimizer."""
        return self

    @property
    def schedule(self) -> Scheduler:
        """Pipeline scheduler, by its name in existing scripts."""
        return self.scheduler

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
        self._begin_losses()

    def _begin_losses(self) -> None:
        self._tokens, self._sums, self._local_losses = 0, [], []

    def execute_schedule(
        self,
        data_iter: Iterator[Batch] | Batch,
        *,
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = False,
        after_backward: Callable[[], None] | None = None,
    ) -> StepResult:
        """Run the forward and backward passes of one step, on a batch or on the next batch of an iterator.

        Args:
            data_iter: Batch, or iterator over batches. A batch is a pair (inputs, labels) with all micro-batches of a
                step.
            forward_only: Whether to skip backward.
            return_loss: Whether to compute the loss. False: run forward only, for the outputs; labels may all be -100.
            return_output_label: Whether to keep outputs and labels in the result.
            after_backward: Function called when this rank's gradients are complete.

        Returns:
            Loss and metrics of the step.

        Raises:
            UserError: ``data_iter`` is neither a batch nor an iterator, or an iterator without another batch.
        """
        training = TrainingStep(
            step=self.state.step, loss_scale=self.optimizer.loss_scale, after_backward=after_backward
        )
        batch = _next_batch(_batches(data_iter), "trainer.execute_schedule")
        if return_loss and not forward_only:
            enter_phase("forward", self.state.step)
        with naming_lost_ranks():
            result = self.scheduler.forward_backward_step(
                self, iter([batch]), forward_only, return_loss, return_output_label, training
            )
        if return_loss and not forward_only:
            self._sums.append(result.host_sums)
            self._local_losses.append(result.local_loss)
            self._tokens += batch[1].numel() * self.scheduler.data_group.size
        return result

    def step(self) -> OptimizerStep:
        """Update the parameters with the learning rate and beta2 of this step, and count the step.

        Returns:
            Result of the optimizer step.

        Raises:
            UserError: Too many steps in a row were skipped because of a non-finite loss or gradient.
        """
        step, sums, local_losses = self.state.step, self._sums, self._local_losses
        loss = torch.stack([of_pass.tensor[LOSS].sum() for of_pass in sums]).sum() if sums else None
        enter_phase("update", step)
        with naming_lost_ranks():
            update = self.optimizer.step(self.lr_schedule(step), self.beta2_schedule(step), loss)
        # Rows of padding, which ranks have that the rows of a step do not suffice for, are no part of the batch.
        tokens = self._tokens if self._plan is None else self._plan.without_padding_rows(step, self._tokens)
        self.state.count_step(update, tokens)
        self._begin_losses()
        if update.is_last_chance:
            # The decision needs a host sync. Read the loss too, so that logging the step does not need another one.
            accelerator.read_together(*sums, update.host_outcome, why="metrics of a step")
            if not update.updated:
                found = find_on_all_ranks(self.optimizer, update, local_losses)
                raise UserError(too_many_skipped_steps(step, update, found))
        return update

    # -- the loop -----------------------------------------------------------------------------------------------------
    def train_step(self, batches: Iterator[Batch]) -> StepReport:
        """Run one training step: fetch a batch, run forward and backward passes, update the parameters.

        Raises:
            UserError: There is no batch, or too many steps in a row were skipped because of a non-finite loss or
                gradient.
        """
        # Read the step before self.step() increments it.
        step, start = self.state.step, accelerator.Mark()
        enter_phase("data wait", step)
        batch = _next_batch(batches, "trainer.train_step")
        fetched = accelerator.Mark()
        # From the number of micro-batches, the optimizer derives when the gradients of a bucket are complete.
        self.optimizer.begin_step(micro_batches=len(batch[1]))
        result = self.execute_schedule(iter([batch]), after_backward=self.optimizer.begin_reduction)
        computed = accelerator.Mark()
        update = self.step()
        end = accelerator.Mark()
        enter_phase("hooks")
        shape = BatchShape.of(batch[0])
        return StepReport(
            step=step,
            result=result,
            update=update,
            shape=shape,
            lr=self.lr_schedule(step),
            beta2=self.beta2_schedule(step),
            data_time=fetched.host_time - start.host_time,
            start=start,
            fetched=fetched,
            computed=computed,
            end=end,
        )

    def fit(self, loader: Loader, total_steps: int, hooks: Sequence[Hook] = ()) -> TrainState:
        """Train from ``state.step`` to ``total_steps``, or until a hook sets ``stop_requested``.

        Args:
            loader: Loader of the run's batches.
            total_steps: Number of steps of the run, including those before a resume.
            hooks: Hooks, called in the given order before and after each step, and in reverse order at the end.

        Returns:
            Progress of the run at the end.

        Raises:
            UserError: The loader has too few batches, or too many steps in a row were skipped because of a
                non-finite loss or gradient.
            LostPeerError: A rank is gone, silent or behind.
        """
        _check_loader(loader)
        loader.seek(self.state.step)
        batches = iter(loader)
        self._plan = loader.plan if isinstance(loader, TrainLoader) else None
        self.train()
        try:
            with naming_lost_ranks():
                for hook in hooks:
                    hook.before_run(self)
                while self.state.step < total_steps and not self.stop_requested:
                    for hook in hooks:
                        hook.before_step(self)
                    report = self.train_step(batches)
                    for hook in hooks:
                        hook.after_step(self, report)
        finally:
            # In reverse order, because later hooks may depend on earlier ones, as with nested contexts.
            for hook in reversed(hooks):
                hook.after_run(self)
        # After the last update, no forward pass waits for the overlapped all-gathers.
        self.optimizer.gather_parameters()
        return self.state


def _check_loader(loader: object) -> None:
    if not hasattr(loader, "seek"):
        message = f"expected a loader, got {type(loader).__name__}"
        todo = "Pass that of build_train_loader_with_data_type; for other batches, write a loop of your own"
        raise UserError(Problem("trainer.fit", message, todo))


def _batches(data: Iterator[Batch] | Batch) -> Iterator[Batch]:
    """Return an iterator over ``data``, which is a batch or an iterator over batches.

    Raises:
        UserError: ``data`` is neither.
    """
    if isinstance(data, (tuple, list)):
        if len(data) == 2 and isinstance(data[0], Mapping):
            return iter([(data[0], data[1])])
    elif hasattr(data, "__next__"):
        return data
    message = f"expected a batch (inputs, labels) or an iterator over batches, got {type(data).__name__}"
    # A loader is not taken: it would begin with its first batch in each call.
    todo = "Pass the batch of a loop over the loader, or the result of iter(loader), created once"
    raise UserError(Problem("trainer.execute_schedule", message, todo))


def _next_batch(batches: Iterator[Batch], where: str) -> Batch:
    """Return the next of ``batches``, for the function ``where`` that needs one.

    Raises:
        UserError: There is none. (StopIteration would silently end a loop around the caller.)
    """
    batch = next(batches, None)
    if batch is None:
        todo = "Pass a batch for each step; a training loader has one for each of data.total_steps"
        raise UserError(Problem(where, "the iterator has no more batches", todo))
    return batch
