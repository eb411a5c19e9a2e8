"""Computation of F, B and W actions: forward, backward and weight gradients of a chunk for one micro-batch.

A model that can be split into stages has an attribute ``stage_layers`` (a
:class:`internlm.core.parallel.sharding.StageLayers`). Its ``forward`` takes the keywords ``chunk``, the index of a
chunk, and ``hidden``, the output of the previous chunk (None for the first). Every chunk but the last returns its
hidden states as one tensor; the last returns the output of the whole model. If the model has a method
``hidden_like(inputs)`` that returns the shape and dtype of the hidden states, stages send them without a header; if it
returns None, a header precedes each message. Models without this method send headers until the shape for inputs of a
shape is learned (:class:`LearnedSpecs`).

Inputs are on the device, except those that the model names in an attribute ``host_inputs``: a model that reads the
values of ``cu_seqlens`` in Python would otherwise wait for the device in every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from internlm.core.parallel.dropout import DropoutKey, dropout_key_scope
from internlm.core.parallel.products import Task, deferring
from internlm.core.parallel.sharding import StageLayers
from internlm.core.scheduler.actions import Message
from internlm.core.scheduler.loss import TokenCrossEntropy, checking_forward, sums_by_type, zero_sums
from internlm.core.scheduler.micro_batches import MicroBatches
from internlm.utils.errors import Problem, UserError

#: Shape and dtype of a tensor.
TensorSpec: TypeAlias = tuple[tuple[int, ...], torch.dtype]


class LearnedSpecs:
    """Shapes and dtypes of the hidden states of a model without ``hidden_like``, as they were in the first step.

    Sender and receiver of a message must agree whether a header precedes it. Hence both learn from all messages of a
    step, and only when the step ends: from then on, a message needs no header if the first step with such inputs had
    one spec for all of them. Its key is the virtual stage that receives it, and the shape of the inputs.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], TensorSpec | None] = {}  # None: more than one
        self._seen: dict[tuple[int, ...], set[TensorSpec]] = {}  # in this step

    def known(self, key: tuple[int, ...]) -> TensorSpec | None:
        """Return the spec of a message without header; None if a header precedes it."""
        return self._known.get(key)

    def note(self, key: tuple[int, ...], hidden: Tensor) -> None:
        """Note the spec of a message that was sent or received."""
        if key not in self._known:
            self._seen.setdefault(key, set()).add((tuple(hidden.shape), hidden.dtype))

    def end_step(self) -> None:
        """Learn from the messages of the step."""
        for key, specs in self._seen.items():
            self._known[key] = next(iter(specs)) if len(specs) == 1 else None
        self._seen.clear()


@dataclass
class InFlight:
    """State kept for one (chunk, micro-batch) pair from its F to its last action, B or W."""

    hidden: Tensor | None  # input of the chunk; its gradient is sent back
    edge: GradientEdge | None  # graph node of the output; the output itself is freed once it has been sent
    output_spec: TensorSpec
    tasks: list[Task] = field(default_factory=list)  # weight gradients that B deferred to W


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Options of :class:`Compute` for one step."""

    types: int  # number of dataset types
    device: torch.device
    #: Weight of the token losses of each micro-batch, [micro-batches], on the device; None: no loss.
    token_weights: Tensor | None = None
    grad_scale: Tensor | float = 1.0  # factor on the weighted sum of the token losses; a scalar on the device
    keep_outputs: bool = False
    dropout_key: DropoutKey = field(default_factory=DropoutKey)  # key of the step, without micro-batch
    learned_specs: LearnedSpecs = field(default_factory=LearnedSpecs)  # from earlier steps


class Compute:
    """Forward computation of a model's chunks, for the micro-batches of one step.

    The forward pass of the last chunk adds the losses, correct predictions and valid tokens to ``sums`` ([4, types],
    see :class:`internlm.core.scheduler.loss.StepResult`). If ``options.keep_outputs`` is set, it also stores the
    model's output in ``outputs``, by micro-batch.
    """

    def __init__(
        self, model: nn.Module, criterion: TokenCrossEntropy, micro_batches: MicroBatches, options: ComputeOptions
    ) -> None:
        self.model, self.criterion, self.micro_batches, self.options = model, criterion, micro_batches, options
        self.dropout_key = replace(options.dropout_key, micro_num=len(micro_batches))
        # A custom model without the attribute is one stage.
        self.stage_layers: StageLayers = getattr(model, "stage_layers", StageLayers.whole(1))
        self.sums = zero_sums(options.types, options.device)
        self.outputs: dict[int, Tensor] = {}

    def hidden_spec(self, message: Message) -> TensorSpec | None:
        """Return the shape and dtype of the hidden states ``message``.

        The result is None if a header precedes them: ``hidden_like`` returned None, or the model has no such method and
        they are not learned yet.
        """
        inputs, hidden_like = self.micro_batches.host_inputs(message.micro_batch), self._hidden_like
        return self.options.learned_specs.known(_key(message, inputs)) if hidden_like is None else hidden_like(inputs)

    def check_hidden(self, message: Message, hidden: Tensor) -> bool:
        """Check the hidden states ``message`` against the shape and dtype that the receiver expects.

        Returns:
            True if the receiver expects a shape and a dtype. False: it needs a header.

        Raises:
            UserError: ``hidden`` does not have the expected shape and dtype, so it would not fit the receiver's buffer.
        """
        expected, actual = self.hidden_spec(message), (tuple(hidden.shape), hidden.dtype)
        if expected is not None and (tuple(expected[0]), expected[1]) != actual:
            name = type(self.model).__name__
            if self._hidden_like is None:
                text = f"expected hidden states {expected}, as in earlier steps with inputs of this shape, got {actual}"
                todo = (
                    f"Give {name} a method hidden_like(inputs) that returns their shape and dtype, or None if they vary"
                )
                raise UserError(Problem(f"{name}.forward", text, todo))
            text = f"expected {actual} (the hidden states that forward returned), got {expected}"
            todo = "Return the shape and dtype of the hidden states, or None if they vary"
            raise UserError(Problem(f"{name}.hidden_like", text, todo))
        return expected is not None

    def note_hidden(self, message: Message, hidden: Tensor) -> None:
        """Note the shape and dtype of the hidden states ``message``, for later steps."""
        if self._hidden_like is None:
            self.options.learned_specs.note(_key(message, self.micro_batches.host_inputs(message.micro_batch)), hidden)

    @property
    def _hidden_like(self) -> Callable[[dict[str, Tensor]], TensorSpec | None] | None:
        return getattr(self.model, "hidden_like", None)

    def forward(self, chunk: int, index: int, hidden: Tensor | None) -> Tensor | None:
        """Run the forward pass of a chunk for micro-batch ``index``.

        Args:
            chunk: Index of the chunk on this rank.
            index: Index of the micro-batch.
            hidden: Output of the previous chunk; None for the first chunk of the model.

        Returns:
            The hidden states; for the last chunk the scaled loss, or None if no loss is computed.
        """
        inputs: dict[str, Any] = self.micro_batches.inputs(index)
        if not self.stage_layers.is_whole or len(self.stage_layers.chunks) > 1:
            inputs |= {"chunk": chunk, "hidden": hidden}
        with dropout_key_scope(replace(self.dropout_key, micro_index=index)):
            if not self.stage_layers.is_last(chunk):
                return self._run_model(inputs)
            if self.options.keep_outputs:
                with torch.no_grad():
                    self.outputs[index] = self._run_model(inputs)
            return self._loss(inputs, index)

    def _run_model(self, inputs: Mapping[str, Any]) -> Tensor:
        with checking_forward(self.model, inputs):
            output: Tensor = self.model(**inputs)
        return output

    def _loss(self, inputs: dict[str, Any], index: int) -> Tensor | None:
        if self.options.token_weights is None:
            return None
        labels = self.micro_batches.labels(index)
        weight = self.options.token_weights[index]
        result = self.criterion(inputs, labels, self.options.grad_scale * weight)
        self.sums += sums_by_type(result, labels, self.micro_batches.type_ids(index), self.options.types, weight)
        return result.loss_sum


def _key(message: Message, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the key under which the spec of ``message`` is learned."""
    return (message.virtual, *inputs["input_ids"].shape)


def keep_in_flight(hidden: Tensor | None, output: Tensor) -> InFlight:
    """Return the state that backward needs after a forward with input ``hidden`` and result ``output``."""
    # Backward starts from the graph node: a reference to the output would keep its memory, which is not read after the
    # send (Megatron frees it by a pseudo-deallocation, --deallocate-pipeline-outputs). If nothing before the output is
    # trainable, it has no node.
    edge = get_gradient_edge(output) if output.requires_grad else None
    return InFlight(hidden, edge, (tuple(output.shape), output.dtype))


def backward(state: InFlight, grad_output: Tensor, defer: bool) -> Tensor | None:
    """Run the backward pass of a chunk and return the gradient of its input, or None for the first chunk.

    The gradients of the parameters are accumulated.

    Args:
        state: State of the chunk and micro-batch; its input and graph are released.
        grad_output: Gradient of the chunk's output.
        defer: Whether to defer the weight gradients to :func:`weight_gradients`.
    """
    hidden, edge = state.hidden, state.edge
    state.hidden = state.edge = None
    if edge is not None:
        if defer:
            with deferring() as state.tasks:
                torch.autograd.backward((edge,), (grad_output,))
        else:
            torch.autograd.backward((edge,), (grad_output,))
    return None if hidden is None else hidden.grad


def weight_gradients(state: InFlight) -> None:
    """Compute the weight gradients that :func:`backward` deferred."""
    # Each task is removed before the next one runs, so that its two factors are freed as early as possible.
    while state.tasks:
        state.tasks.pop(0)()
