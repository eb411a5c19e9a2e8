"""Forward and backward of a chunk for a micro-batch: what comes out, and what is kept meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm.core.parallel.param_state import attach_main_grad, main_grad_of
from internlm.core.parallel.sharding import Sharding, StageLayers, building
from internlm.core.scheduler.actions import FORWARD, Message
from internlm.core.scheduler.compute import (
    Compute,
    ComputeOptions,
    InFlight,
    LearnedSpecs,
    backward,
    keep_in_flight,
    weight_gradients,
)
from internlm.core.scheduler.loss import TokenCrossEntropy
from internlm.core.scheduler.micro_batches import MicroBatches
from internlm.model.decoder import Decoder
from internlm.utils.errors import UserError
from tests.unit.model.samples import decoder, tokens

CPU = torch.device("cpu")
LENGTH = 8


def batch(count: int = 3) -> tuple[dict[str, Any], Tensor]:
    """Micro-batches of one row, of one, two, … pieces."""
    bounds = [torch.tensor([*range(pieces), LENGTH], dtype=torch.int32) for pieces in range(1, count + 1)]
    labels = tokens(count, LENGTH, seed=4)
    labels[0, :3] = -100
    type_ids = torch.arange(count)[:, None].expand(count, LENGTH) % 2
    inputs = {"input_ids": tokens(count, LENGTH), "cu_seqlens": bounds, "type_ids": type_ids, "note": "not for models"}
    return inputs, labels


def stage_layers(*chunks: range) -> Decoder:
    with building(Sharding(), StageLayers(4, chunks)):
        return decoder(num_layers=4)


def compute_of(model: nn.Module, grad_scale: float | None = 1.0, wants_outputs: bool = False) -> Compute:
    options = ComputeOptions(types=2, device=CPU, keep_outputs=wants_outputs)
    if grad_scale is not None:
        options = replace(options, token_weights=torch.ones(3, dtype=torch.float64), grad_scale=grad_scale)
    return Compute(model, TokenCrossEntropy(model), MicroBatches(*batch(), CPU, types=2), options)


def to_next(number: int) -> Message:
    """Hidden states for virtual stage 1."""
    return Message(FORWARD, 1, number)


def hidden_units(compute: Compute, number: int = 0) -> Tensor:
    shape, dtype = compute.hidden_spec(to_next(number))
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(number)).requires_grad_()


# -- forward


class OneInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class LossInside(nn.Module):
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, labels: Tensor) -> Tensor:
        return input_ids


class OwnLoss(nn.Module):
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return input_ids.double().sum()


class Tupled(nn.Module):
    def forward(self, **inputs: Tensor) -> tuple[Tensor, None]:
        return torch.zeros(LENGTH, 61), None


class Pooled(nn.Module):
    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.zeros(1, 61)


class Failing(nn.Module):
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        raise TypeError("a bug in the model")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            OneInput(),
            UserError,
            r"^OneInput\.forward: expected forward\(input_ids, cu_seqlens\), got forward\(x: .*\. Take ",
        ),
        (
            LossInside(),
            UserError,
            r"^LossInside.*: expected forward\(.*, labels, label_smoothing, grad_scale\), got forward",
        ),
        (
            OwnLoss(),
            UserError,
            r"^OwnLoss\.forward: expected a TokenLoss .*, got a tensor \[\]\. Return one, or remove ",
        ),
        (Tupled(), UserError, r"^Tupled\.forward: expected logits \[8, vocabulary\], got tuple\. Return the logits"),
        (Pooled(), UserError, r"^Pooled\.forward: expected logits \[8, vocabulary\], got a tensor \[1, 61\]"),
        (Failing(), TypeError, "^a bug in the model$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_forward_that_is_not_as_expected(model: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compute_of(model).forward(0, 1, None)


def test_the_whole_model_is_not_told_of_chunks() -> None:
    """Nor need it know of them."""

    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
            return torch.eye(61, dtype=torch.float64)[input_ids]

    compute = compute_of(Plain(), wants_outputs=True)
    assert not compute.check_hidden(to_next(0), torch.zeros(3))
    assert compute.hidden_spec(to_next(0)) is None
    loss = compute.forward(0, 1, None)
    assert loss is not None
    assert loss.shape == ()
    assert compute.outputs[1].shape == (LENGTH, 61)


def test_hidden_units_of_another_form_than_foretold_are_not_sent() -> None:
    compute = compute_of(stage_layers(range(2)))
    good = hidden_units(compute)
    assert compute.check_hidden(to_next(0), good)
    for bad in (good[:-1], good.float()):
        with pytest.raises(UserError, match=r"^\w+\.hidden_like: expected .* \(the hidden states .*, got "):
            compute.check_hidden(to_next(0), bad)


def test_shapes_are_learned_from_whole_steps() -> None:
    """Never within one: the receiver posts its receives before it sees the first message."""
    specs, shape = LearnedSpecs(), (1, 8)
    for length in (4, 4):
        specs.note((1, *shape), torch.zeros(length, 2))
        specs.note((2, *shape), torch.zeros(length + len(specs._seen), 2))
        assert specs.known((1, *shape)) is specs.known((2, *shape)) is None
    specs.note((2, *shape), torch.zeros(9, 2))
    specs.end_step()
    assert specs.known((1, *shape)) == ((4, 2), torch.float32)
    assert specs.known((2, *shape)) is None  # two shapes
    specs.note((2, *shape), torch.zeros(9, 2))
    specs.end_step()
    assert specs.known((2, *shape)) is None
    assert specs.known((1, 1, 9)) is None


def test_hidden_units_of_another_form_than_learned_are_not_sent() -> None:
    class Plain(nn.Module):
        pass

    options = ComputeOptions(types=2, device=CPU)
    compute = Compute(Plain(), TokenCrossEntropy(decoder()), MicroBatches(*batch(), CPU), options)
    compute.note_hidden(to_next(1), torch.zeros(3))
    compute.options.learned_specs.end_step()
    assert compute.check_hidden(to_next(1), torch.zeros(3))
    with pytest.raises(
        UserError, match=r"^Plain.forward: expected hidden states \(\(3,\), torch.float32\), as in earlier"
    ):
        compute.check_hidden(to_next(1), torch.zeros(4))


def test_sums_are_those_of_the_last_chunk_by_type() -> None:
    model = decoder(num_layers=4)
    compute = compute_of(model, grad_scale=0.5)
    losses = [compute.forward(0, number, None) for number in range(3)]
    assert compute.sums[2].tolist() == [LENGTH - 3 + LENGTH, LENGTH]
    by_type = [(losses[0] + losses[2]).item() * 2, losses[1].item() * 2]
    assert compute.sums[0].tolist() == pytest.approx(by_type, rel=1e-12)
    assert compute.outputs == {}


def test_chunks_one_after_another_are_the_model() -> None:
    whole, model = compute_of(decoder(num_layers=4)), stage_layers(range(1), range(1, 3), range(3, 4))
    assert model.stage_layers.is_whole
    compute, hidden = compute_of(model), None
    for chunk in range(3):
        hidden = compute.forward(chunk, 2, hidden)
    assert torch.equal(hidden, whole.forward(0, 2, None))
    assert torch.equal(compute.sums, whole.sums)


def test_no_loss_is_wanted() -> None:
    model = stage_layers(range(2, 4))
    compute = compute_of(model, grad_scale=None, wants_outputs=True)
    assert compute.forward(0, 1, hidden_units(compute, 1).detach()) is None
    assert compute.outputs[1].shape == (LENGTH, 61)
    assert not compute.sums.any()


# -- backward


def run_backward(compute: Compute, defer: bool) -> tuple[InFlight, Tensor | None]:
    """F and B of the first chunk."""
    hidden = None if compute.stage_layers.is_first(0) else hidden_units(compute)
    output = compute.forward(0, 0, hidden)
    assert output is not None
    kept = keep_in_flight(hidden, output)
    assert kept.output_spec == (tuple(output.shape), output.dtype)
    return kept, backward(kept, torch.ones_like(output), defer)


def with_main_grads(model: Decoder) -> Decoder:
    for parameter in model.parameters():
        attach_main_grad(parameter, torch.zeros_like(parameter))
    return model


@pytest.mark.parametrize("numbers", [range(2), range(1, 3), range(2, 4)], ids=["first", "middle", "last"])
def test_backward_in_two_is_backward(numbers: range) -> None:
    models = [with_main_grads(stage_layers(numbers)) for _ in range(2)]
    (_, gradient), (kept, early) = (run_backward(compute_of(model), i == 1) for i, model in enumerate(models))
    assert (gradient is None) == (numbers.start == 0)
    assert gradient is None or torch.equal(early, gradient)
    assert len(kept.tasks) == 8
    weight_gradients(kept)
    assert kept.tasks == []
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(main_grad_of(ours), main_grad_of(theirs))
        assert main_grad_of(ours).any()


@pytest.mark.parametrize("defer", [False, True])
def test_a_frozen_chunk_passes_the_gradient_on(defer: bool) -> None:
    trained, frozen = (with_main_grads(stage_layers(range(1, 3))) for _ in range(2))
    frozen.requires_grad_(False)
    _, wanted = run_backward(compute_of(trained), False)
    kept, found = run_backward(compute_of(frozen), defer)
    assert torch.equal(found, wanted)
    assert kept.tasks == []
    assert not any(main_grad_of(parameter).any() for parameter in frozen.parameters())


@pytest.mark.parametrize("defer", [False, True])
def test_a_first_chunk_that_is_frozen_has_nothing_to_do(defer: bool) -> None:
    """Its output needs no gradient, so there is no graph; the next stage sends one nevertheless."""
    kept, gradient = run_backward(compute_of(stage_layers(range(2)).requires_grad_(False)), defer)
    assert (gradient, kept.tasks) == (None, [])


# -- memory


def storage_of(tensor: Tensor) -> weakref.ref[torch.UntypedStorage]:
    """Lives as long as the memory of ``tensor``, whoever else has a share of it."""
    return weakref.ref(tensor.untyped_storage())


def addresses(storages: list[weakref.ref[torch.UntypedStorage]]) -> set[int]:
    """Of those that are still there."""
    return {alive.data_ptr() for storage in storages if (alive := storage()) is not None}


@contextmanager
def saved_for_backward() -> Iterator[list[weakref.ref[torch.UntypedStorage]]]:
    """The memory of all that autograd keeps in the block, but parameters."""
    kept: list[weakref.ref[torch.UntypedStorage]] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept.append(storage_of(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def in_tasks(kept: InFlight) -> list[weakref.ref[torch.UntypedStorage]]:
    """The memory of what tasks hold, but parameters."""
    held = [held for task in kept.tasks for held in task.args]
    return [storage_of(each) for each in held if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)]


@pytest.mark.parametrize("numbers", [range(2), range(1, 3)], ids=["first", "middle"])
def test_an_output_may_go_once_it_was_sent(numbers: range) -> None:
    """What backward needs of it is its place in the graph."""
    compute = compute_of(with_main_grads(stage_layers(numbers)))
    hidden = None if numbers.start == 0 else hidden_units(compute)
    output = compute.forward(0, 0, hidden)
    assert output is not None
    grad_output, sent = torch.ones_like(output), storage_of(output)
    kept = keep_in_flight(hidden, output)
    assert sent() is not None
    del output
    assert sent() is None
    assert (backward(kept, grad_output, False) is None) == (hidden is None)


@pytest.mark.parametrize("defer", [False, True])
def test_activations_go_with_the_last_action(defer: bool) -> None:
    compute = compute_of(with_main_grads(stage_layers(range(1, 3))))
    with saved_for_backward() as saved:
        hidden = hidden_units(compute)
        output = compute.forward(0, 0, hidden)
        assert output is not None
        kept = keep_in_flight(hidden, output)
    grad_output = torch.ones_like(output)
    del output, hidden
    assert addresses(saved)
    backward(kept, grad_output, defer)
    del grad_output
    left = in_tasks(kept)
    assert bool(left) == defer
    assert addresses(saved) <= addresses(left)  # an input of a linear may be one of both
    weight_gradients(kept)
    assert addresses(left) == addresses(saved) == set()
