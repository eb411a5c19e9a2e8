"""The schedulers: names over one executor, each with its kind of table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.peer_failure import ALL, attributing_peer_failure
from internlm.core.parallel.collectives import all_reduce
from internlm.core.parallel.dropout import DropoutKey
from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.compute import Compute, MicroBatches
from internlm.core.scheduler.executor import Executor, Record
from internlm.core.scheduler.loss import LOSS, TOKENS, StepResult, TokenCrossEntropy
from internlm.core.scheduler.plan import Step, plan_of
from internlm.core.scheduler.table import make_table

Batch = tuple[dict[str, Any], Tensor]


class Engine(Protocol):
    """Whatever has the model: a trainer, say."""

    model: nn.Module


@dataclass(frozen=True)
class Pipeline:
    """This rank's place among the stages. ``channels`` lead to the other ranks, if there are any."""

    group: Group = NO_PIPELINE
    chunks: int = 1
    channels: Channels | None = None
    #: The table for a number of micro-batches, where it is not that of the scheduler's kind.
    own_table: Callable[[int], Table] | None = None


class Scheduler:
    """Runs the micro-batches of a step in the order of a table.

    ``types`` is the number of data-set types; ``data_group`` joins the ranks of a stage whose tokens make up the global
    batch. ``draws`` says who this rank is to masks of dropout.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        criterion: TokenCrossEntropy,
        types: int,
        data_group: Group,
        device: torch.device,
        pipeline: Pipeline | None = None,
        draws: DropoutKey | None = None,
    ) -> None:
        self.criterion, self.types, self.data_group, self.device = criterion, types, data_group, device
        self.draws = draws or DropoutKey()
        self.pipeline = pipeline or Pipeline()
        #: Told of each action of steps with backward, where somebody sets a list.
        self.records: list[Record] | None = None
        #: Pairs of chunk and micro-batch that were between F and their last action, at their most in the last step.
        self.peak_in_flight = 0
        self._plans: dict[tuple[int, bool], tuple[Step, ...]] = {}

    def table(self, micro_batches: int, backward: bool = True) -> Table:
        """The schedule of a step; raises :class:`ScheduleError` where there is none."""
        standard = partial(make_table, self.kind, self.pipeline.group.size, self.pipeline.chunks)
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
        after_backward: Callable[[], None] | None = None,
        step: int = 0,
        loss_scale: float = 1.0,
    ) -> StepResult:
        """Take the next batch and run it forward, and backward unless ``forward_only``.

        Gradients are those of the mean loss over the valid tokens of the *global* batch, summed (not averaged) over
        micro-batches and ranks. ``return_loss=False`` (with labels the model cannot use, say) goes forward only,
        for the outputs. ``after_backward`` is called when this rank's gradients are complete, which may be while other
        stages still compute theirs. Masks of dropout depend on ``step``;
        ``loss_scale`` is a factor on the gradients.
        """
        micro_batches = MicroBatches(*next(data_iter), self.device)
        backward = not forward_only and return_loss
        scale = loss_scale * self._grad_scale(micro_batches) if return_loss else None
        options = self.types, self.device, scale, return_output_label, replace(self.draws, step=step)
        compute = Compute(engine.model, self.criterion, micro_batches, *options)
        executor = Executor(self._plan(len(micro_batches), backward), compute, self.pipeline.channels, backward)
        executor.run(self.records if backward else None)
        if backward:
            self.peak_in_flight = executor.peak_in_flight
            if after_backward is not None:
                after_backward()
        return self._result(compute, return_loss, return_output_label)

    def _plan(self, micro_batches: int, backward: bool) -> tuple[Step, ...]:
        key = micro_batches, backward
        if key not in self._plans:
            self._plans[key] = plan_of(self.table(*key), self.pipeline.group.rank)
        return self._plans[key]

    def _grad_scale(self, micro_batches: MicroBatches) -> float:
        """One over the valid tokens of the global batch."""
        return 1.0 / max(int(all_reduce(micro_batches.valid_tokens(), self.data_group)), 1)

    def _result(self, compute: Compute, return_loss: bool, return_output_label: bool) -> StepResult:
        """Of the sums, which the last stage has, every rank gets those over all ranks."""
        numbers = sorted(compute.outputs) if return_output_label else []
        outputs = [compute.outputs[number] for number in numbers]
        labels = [compute.micro_batches.labels(number) for number in numbers]
        if not return_loss:
            return StepResult(float("nan"), compute.sums, outputs, labels)
        with self._naming_lost():
            sums = all_reduce(all_reduce(compute.sums, self.data_group), self.pipeline.group)
        tokens = sums[TOKENS].sum()
        return StepResult(float(sums[LOSS].sum() / tokens) if tokens else 0.0, sums, outputs, labels)

    def _naming_lost(self) -> AbstractContextManager[None]:
        """Here a stage waits that is done, while another may be stuck in the middle of the step."""
        if self.pipeline.channels is None:
            return nullcontext()
        return attributing_peer_failure(self.pipeline.group, ALL, "end the step", self.pipeline.channels.timeout)


class NonPipelineScheduler(Scheduler):
    """No pipeline: micro-batches one after another, gradients accumulated. That is 1F1B on one stage."""

    kind = "1f1b"


class GPipeScheduler(Scheduler):
    """All forward, then all backward (arXiv 1811.06965)."""

    kind = "gpipe"


class PipelineScheduler(Scheduler):
    """1F1B (arXiv 2006.09503, 2104.04473)."""

    kind = "1f1b"


class InterleavedPipelineScheduler(Scheduler):
    """1F1B with several chunks a stage (arXiv 2104.04473)."""

    kind = "interleaved"


class ZeroBubblePipelineScheduler(Scheduler):
    """ZB-H1 (arXiv 2401.10241)."""

    kind = "zbh1"


class ZeroBubblePipelineVShapeScheduler(Scheduler):
    """ZB-V (arXiv 2405.15362): two chunks a stage, there and back."""

    kind = "zbv"


#: The scheduler of each kind of table.
SCHEDULERS: dict[str, type[Scheduler]] = {
    each.kind: each
    for each in (
        GPipeScheduler,
        PipelineScheduler,
        InterleavedPipelineScheduler,
        ZeroBubblePipelineScheduler,
        ZeroBubblePipelineVShapeScheduler,
    )
}
