"""The schedulers: what a step gives, whatever the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.sharding import Sharding, StageLayers, building
from internlm.core.scheduler import NonPipelineScheduler, Scheduler, TokenCrossEntropy
from internlm.core.scheduler.actions import BACKWARD, FORWARD, Action, Table
from internlm.core.scheduler.executor import ActionMarks
from internlm.core.scheduler.loss import LOSS
from internlm.core.scheduler.schedulers import SCHEDULERS, Pipeline, TrainingStep
from internlm.core.scheduler.table import make_table, read_table, write_table
from tests.unit.model.samples import decoder, tokens

CPU = torch.device("cpu")
DATA = Group(ParallelMode.DATA)
MICRO_BATCHES = 3
CHUNKS = {"interleaved": 2, "zbv": 2}


class Engine:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def batches(micro_num: int = MICRO_BATCHES) -> Iterator[tuple[dict[str, Any], Tensor]]:
    ids, labels = tokens(micro_num, 2, 8), tokens(micro_num, 2, 8, seed=4)
    labels[0, 0, :5] = -100
    yield {"input_ids": ids, "type_ids": torch.zeros_like(ids)}, labels


def in_chunks(chunks: int) -> nn.Module:
    """A model of four layers that is whole on this rank, in so many chunks of as many layers."""
    size = 4 // chunks
    part = StageLayers(4, tuple(range(start, start + size) for start in range(0, 4, size)))
    with building(Sharding(), part):
        return decoder(num_layers=4)


def scheduler_of(schedule: str, model: nn.Module) -> Scheduler:
    pipeline = Pipeline(NO_PIPELINE, CHUNKS.get(schedule, 1))
    return SCHEDULERS[schedule](TokenCrossEntropy(model), 1, DATA, CPU, pipeline)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_every_schedule_runs_on_one_stage_too(schedule: str) -> None:
    """Chunks hand on to one another without a channel."""
    reference, model = decoder(num_layers=4), in_chunks(CHUNKS.get(schedule, 1))
    simple = NonPipelineScheduler(TokenCrossEntropy(reference), 1, DATA, CPU)
    expected = simple.forward_backward_step(Engine(reference), batches())
    found = scheduler_of(schedule, model).forward_backward_step(Engine(model), batches())
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-12, atol=0)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("empty", [False, True])
def test_the_loss_may_be_the_mean_of_the_means_of_micro_batches(empty: bool) -> None:
    """Against torch's; a micro-batch without valid tokens has no mean."""
    reference, model = decoder(), decoder()
    inputs, labels = next(batches())
    if empty:
        labels[1] = -100
    means = [
        nn.functional.cross_entropy(reference(ids).flatten(0, 1), label.flatten())
        for ids, label in zip(inputs["input_ids"], labels, strict=True)
        if (label != -100).any()
    ]
    expected = torch.stack(means).mean()
    expected.backward()
    scheduler = NonPipelineScheduler(TokenCrossEntropy(model), 1, DATA, CPU, micro_batch_group=DATA)
    found = scheduler.forward_backward_step(Engine(model), iter([(inputs, labels)]))
    assert found.loss == pytest.approx(expected.item(), rel=1e-12)
    assert found.loss != pytest.approx(float(found.sums[LOSS].sum() / found.valid_tokens), rel=1e-4) or empty
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-9, atol=1e-12)


def test_after_backward_is_calls_once_gradients_are_complete() -> None:
    model = decoder()
    calls: list[dict[str, Tensor]] = []
    scheduler = NonPipelineScheduler(TokenCrossEntropy(model), 1, DATA, CPU)
    scheduler.forward_backward_step(
        Engine(model), batches(), training=TrainingStep(after_backward=lambda: calls.append(gradients(model)))
    )
    assert len(calls) == 1
    assert all(torch.equal(calls[0][name], gradient) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("options", [{"forward_only": True}, {"return_loss": False}])
def test_without_backward_nothing_is_calls(options: dict[str, bool]) -> None:
    model = decoder()
    scheduler = NonPipelineScheduler(TokenCrossEntropy(model), 1, DATA, CPU)

    def fail() -> None:
        raise AssertionError("there are no gradients")

    scheduler.forward_backward_step(Engine(model), batches(), training=TrainingStep(after_backward=fail), **options)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_records_tell_every_action_in_order() -> None:
    model = in_chunks(2)
    scheduler = scheduler_of("interleaved", model)
    actions: list[ActionMarks] = []
    scheduler.after_action = actions.append
    scheduler.forward_backward_step(Engine(model), batches())
    records = [marks.record(actions[0].begin) for marks in actions]
    assert tuple(each.action for each in records) == make_table("interleaved", 1, 2, MICRO_BATCHES).actions[0]
    moments = [moment for each in records for moment in each[1:]]
    assert moments == sorted(moments)


def test_a_table_of_ones_own_is_run(tmp_path: Path) -> None:
    """Backward in another order than forward."""
    row = [*(Action(FORWARD, n) for n in range(3)), *(Action(BACKWARD, n) for n in (1, 2, 0))]
    write_table(Table("mine", make_table("1f1b", 1, 1, 3).stage_layout, 3, (tuple(row),)), tmp_path / "mine.csv")
    model = decoder()
    pipeline = Pipeline(own_table=lambda micro_batches: read_table(tmp_path / "mine.csv", 1, 1, micro_batches))
    scheduler = SCHEDULERS["1f1b"](TokenCrossEntropy(model), 1, DATA, CPU, pipeline)
    actions: list[ActionMarks] = []
    scheduler.after_action = actions.append
    scheduler.forward_backward_step(Engine(model), batches())
    assert [marks.action for marks in actions] == row
    assert scheduler.peak_in_flight == 3
    assert scheduler.forward_backward_step(Engine(model), batches(5), forward_only=True).valid_tokens == 5 * 16 - 5
