"""Schedulers: one class per published schedule, all run by the same executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.parallel.collectives import all_reduce
from internlm.core.parallel.dropout import DropoutKey
from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.compute import Compute, ComputeOptions, LearnedSpecs
from internlm.core.scheduler.executor import ActionMarks, Executor
from internlm.core.scheduler.loss import LOSS, StepResult, TokenCrossEntropy, token_weights
from internlm.core.scheduler.micro_batches import MicroBatches
from internlm.core.scheduler.plan import Step, make_plan
from internlm.core.scheduler.table import ScheduleName, make_table

Batch = tuple[dict[str, Any], Tensor]


class Engine(Protocol):
    """Protocol for an object with a ``model`` attribute, such as a trainer."""

    model: nn.Module


@dataclass(frozen=True)
class Pipeline:
    """Pipeline of this rank: process group, number of chunks, channels and custom action table."""

    group: Group = NO_PIPELINE
    chunks: int = 1
    channels: Channels | None = None  # None: a pipeline of one rank
    #: Function that returns a custom table for a number of micro-batches; None: use the table of the schedule.
    own_table: Callable[[int], Table] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Settings of one step."""

    step: int = 0  # index of the step, part of the dropout RNG key
    loss_scale: Tensor | float = 1.0  # factor on the gradients; a scalar on the device, or a number
    #: Called when this rank's gradients are complete, while other stages may still compute their gradients.
    after_backward: Callable[[], None] | None = None
    types: int | None = None  # number of dataset types in the batch; None: that of the scheduler


class Scheduler:
    """Base class of the schedulers, which run the micro-batches of a step in the order of an action table.

    Args:
        criterion: Callable that runs the model on a micro-batch and returns the token losses.
        types: Number of dataset types.
        data_group: Group of the ranks of this stage that hold different tokens of the global batch.
        device: Device to which micro-batches are copied.
        pipeline: Pipeline of this rank. None: no pipeline.
        dropout_key: Dropout RNG key of this rank; the step and the micro-batch are set before each forward.
        micro_batch_group: Ranks that hold different tokens of the same micro-batches. If given, the loss is the mean
            over micro-batches of their mean losses (``loss.average = "micro_batch"``). None: the loss is the mean over
            the valid tokens of the global batch.
    """

    schedule: ClassVar[ScheduleName]

    def __init__(
        self,
        criterion: TokenCrossEntropy,
        types: int,
        data_group: Group,
        device: torch.device,
        pipeline: Pipeline | None = None,
        dropout_key: DropoutKey | None = None,
        micro_batch_group: Group | None = None,
    ) -> None:
        self.criterion, self.types, self.data_group, self.device = criterion, types, data_group, device
        self.dropout_key, self.micro_batch_group = dropout_key or DropoutKey(), micro_batch_group
        self.pipeline = pipeline or Pipeline()
        #: Called after each action of a step with backward; None: nothing is marked.
        self.after_action: Callable[[ActionMarks], None] | None = None
        self._learned_specs = LearnedSpecs()
        #: Largest number of (chunk, micro-batch) pairs in flight during the last step.
        self.peak_in_flight = 0
        # A plan depends only on the number of micro-batches and on ``backward``, and requires a simulation.
        self._plans: dict[tuple[int, bool], tuple[Step, ...]] = {}

    def table(self, micro_batches: int, backward: bool = True) -> Table:
        """Return the action table for a step with ``micro_batches`` micro-batches.

        If ``backward`` is False, return the F actions of the built-in schedule, even if there is a custom table.

        Raises:
            ScheduleError: The schedule does not support the number of stages, chunks or micro-batches, or the custom
                table is invalid.
        """
        standard = partial(make_table, self.schedule, self.pipeline.group.size, self.pipeline.chunks)
        if not backward:
            return standard(micro_batches).forward_only()
        return (self.pipeline.own_table or standard)(micro_batches)

    def forward_backward_step(
        self,
        engine: Engine,
        data_iter: Iterator[Batch],
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = False,
        training: TrainingStep | None = None,
    ) -> StepResult:
        """Run the forward pass of the next batch, and the backward pass unless ``forward_only`` is set.

        The denominators of the loss are those of the *global* batch (see :func:`token_weights`), and they are known
        before the first backward. Gradients must therefore be summed, not averaged, over micro-batches and ranks.

        Args:
            engine: Object whose ``model`` is run.
            data_iter: Iterator over (inputs, labels) of all micro-batches of a step.
            forward_only: Whether to skip backward.
            return_loss: Whether to compute the loss. False: run forward only, for the outputs; labels may all be -100.
            return_output_label: Whether to keep outputs and labels in the result.
            training: Settings of the step (default: ``TrainingStep()``).
        """
        training = training or TrainingStep()
        types = training.types or self.types
        host_inputs = getattr(engine.model, "host_inputs", ())
        vocab_size = getattr(engine.model, "input_vocab_size", None)
        micro_batches = MicroBatches(*next(data_iter), self.device, host_inputs, types, vocab_size)
        backward = not forward_only and return_loss
        options = ComputeOptions(
            types=types,
            device=self.device,
            keep_outputs=return_output_label,
            dropout_key=replace(self.dropout_key, step=training.step),
            learned_specs=self._learned_specs,
        )
        if return_loss:
            weights, valid_tokens = self._token_weights(micro_batches)
            grad_scale = training.loss_scale * valid_tokens.reciprocal()
            options = replace(options, token_weights=weights, grad_scale=grad_scale)
        compute = Compute(engine.model, self.criterion, micro_batches, options)
        executor = Executor(self._plan(len(micro_batches), backward), compute, self.pipeline.channels, backward)
        executor.run(self.after_action if backward else None)
        if backward:
            self.peak_in_flight = executor.peak_in_flight
            if training.after_backward is not None:
                training.after_backward()
        return self._result(compute, return_loss)

    def _plan(self, micro_batches: int, backward: bool) -> tuple[Step, ...]:
        key = micro_batches, backward
        if key not in self._plans:
            self._plans[key] = make_plan(self.table(*key), self.pipeline.group.rank)
        return self._plans[key]

    def _token_weights(self, micro_batches: MicroBatches) -> tuple[Tensor, Tensor]:
        """Return the weight of each micro-batch and the valid tokens of the global batch (:func:`token_weights`)."""
        return token_weights(micro_batches.valid_tokens(), self.data_group, self.micro_batch_group)

    def _result(self, compute: Compute, return_loss: bool) -> StepResult:
        """Return the result of the step, with sums all-reduced over the data-parallel ranks and the stages."""
        indices = sorted(compute.outputs)
        outputs = [compute.outputs[index] for index in indices]
        labels = [compute.micro_batches.labels(index) for index in indices]
        if not return_loss:
            return StepResult(compute.sums, outputs, labels)
        # Of this rank, to which a loss that is not finite may then be attributed: the all-reduce is in place.
        local_loss = compute.sums[LOSS].sum()
        # All other stages add zeros, so the all-reduce broadcasts from the stage with the head, whichever it is.
        sums = all_reduce(all_reduce(compute.sums, self.data_group), self.pipeline.group)
        return StepResult(sums, outputs, labels, local_loss)


class NonPipelineScheduler(Scheduler):
    """Scheduler without a pipeline: gradient accumulation over micro-batches, as 1F1B on one stage."""

    schedule = "1f1b"


class GPipeScheduler(Scheduler):
    """GPipe scheduler: all forwards, then all backwards (arXiv 1811.06965)."""

    schedule = "gpipe"


class PipelineScheduler(Scheduler):
    """1F1B scheduler: forwards and backwards alternate (arXiv 2006.09503, 2104.04473)."""

    schedule = "1f1b"


class InterleavedPipelineScheduler(Scheduler):
    """Interleaved 1F1B scheduler, with several chunks per rank (arXiv 2104.04473)."""

    schedule = "interleaved"


class ZeroBubblePipelineScheduler(Scheduler):
    """ZB-H1 scheduler: 1F1B with deferred weight gradients (arXiv 2401.10241)."""

    schedule = "zbh1"


class ZeroBubblePipelineVShapeScheduler(Scheduler):
    """ZB-V scheduler: two chunks per rank, assigned in a V shape, with deferred weight gradients (arXiv 2405.15362)."""

    schedule = "zbv"


#: Scheduler class of each schedule.
SCHEDULERS: dict[ScheduleName, type[Scheduler]] = {
    scheduler.schedule: scheduler
    for scheduler in (
        GPipeScheduler,
        PipelineScheduler,
        InterleavedPipelineScheduler,
        ZeroBubblePipelineScheduler,
        ZeroBubblePipelineVShapeScheduler,
    )
}
