"""What a rank does with a micro-batch: forward and backward of one chunk of its model.

A model that can be split into stages has an attribute ``stage_layers``
(a :class:`internlm.core.parallel.sharding.StageLayers`), and its
``forward`` takes ``chunk``, and ``hidden``: what the chunk before it gave, but for the first. All but the last give
hidden units, one tensor; the last, what a model gives that is whole. Where it has ``hidden_like(inputs)``, the shape
and type of hidden units, nobody need be told of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from internlm.core.parallel.dropout import DropoutKey, dropout_key_scope
from internlm.core.parallel.products import Task, deferring
from internlm.core.parallel.sharding import StageLayers
from internlm.core.scheduler.loss import TokenCrossEntropy, no_sums, sums_by_type
from internlm.utils.errors import Problem, UserError

#: Shape and type of a tensor.
Form: TypeAlias = tuple[tuple[int, ...], torch.dtype]

MODEL_INPUTS = ("input_ids", "cu_seqlens", "indexes")


class MicroBatches:
    """The micro-batches of a step, brought to the device one by one."""

    def __init__(self, batch: Mapping[str, Any], labels: Tensor, device: torch.device) -> None:
        self._batch, self._labels, self._device = batch, labels, device

    def __len__(self) -> int:
        return len(self._labels)

    def inputs(self, number: int) -> dict[str, Tensor]:
        """What a model takes."""
        return {key: self._on_device(tensor) for key, tensor in self.inputs_as_read(number).items()}

    def inputs_as_read(self, number: int) -> dict[str, Tensor]:
        """The same, not on the device: to look at their shapes."""
        return {key: self._batch[key][number] for key in MODEL_INPUTS if key in self._batch}

    def labels(self, number: int) -> Tensor:
        """Of the shape of ``input_ids``."""
        return self._on_device(self._labels[number])

    def type_ids(self, number: int) -> Tensor:
        """The data-set type of each token."""
        return self._on_device(self._batch["type_ids"][number])

    def valid_tokens(self) -> Tensor:
        """How many labels count, of all micro-batches."""
        return self._on_device((self._labels != -100).sum())

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


@dataclass
class InFlight:
    """What is kept of a micro-batch between the F of a chunk and its last action."""

    hidden: Tensor | None  # the input, whose gradient is wanted
    edge: GradientEdge | None  # of the output, which itself may go once it was sent
    form: Form  # of the output
    tasks: list[Task] = field(default_factory=list)  # left by B to W


class Compute:
    """The chunks of ``model`` on the micro-batches of one step.

    ``sums`` and ``outputs`` gather what the last chunk gives: of all micro-batches, in their order.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: TokenCrossEntropy,
        micro_batches: MicroBatches,
        types: int,
        device: torch.device,
        grad_scale: float | None,
        wants_outputs: bool = False,
        draws: DropoutKey | None = None,
    ) -> None:
        """``grad_scale``: factor on the sum of the token losses; None: no loss is wanted. ``draws``: what masks of
        dropout are drawn from, but for the number of the micro-batch."""
        self.model, self.criterion, self.micro_batches, self.types = model, criterion, micro_batches, types
        self.grad_scale, self.wants_outputs = grad_scale, wants_outputs
        self.draws = replace(draws or DropoutKey(), micro_num=len(micro_batches))
        self.stage_layers: StageLayers = getattr(model, "stage_layers", StageLayers.whole(1))
        self.sums = no_sums(types, device)
        self.outputs: dict[int, Tensor] = {}

    def hidden_form(self, number: int) -> Form | None:
        """Shape and type of the hidden units of a micro-batch, where the model foretells them."""
        hidden_like = getattr(self.model, "hidden_like", None)
        return hidden_like(self.micro_batches.inputs_as_read(number)) if hidden_like else None

    def check_form(self, number: int, hidden: Tensor) -> bool:
        """Whether the form of the hidden units of a micro-batch was foretold; raises :class:`UserError` where it was
        another one, into which nobody could receive them."""
        foretold, found = self.hidden_form(number), (tuple(hidden.shape), hidden.dtype)
        if foretold is not None and (tuple(foretold[0]), foretold[1]) != found:
            what = f"foretold {foretold}, but a chunk gave {found}"
            raise UserError(Problem("hidden_like of the model", what, "Make them agree, or remove it"))
        return foretold is not None

    def forward(self, chunk: int, number: int, hidden: Tensor | None) -> Tensor | None:
        """Hidden units; of the last chunk the loss, if one is wanted."""
        with dropout_key_scope(replace(self.draws, number=number)):
            return self._forward(chunk, number, hidden)

    def _forward(self, chunk: int, number: int, hidden: Tensor | None) -> Tensor | None:
        inputs: dict[str, Any] = self.micro_batches.inputs(number)
        if not self.stage_layers.is_whole or len(self.stage_layers.chunks) > 1:
            inputs |= {"chunk": chunk, "hidden": hidden}
        if not self.stage_layers.is_last(chunk):
            output: Tensor = self.model(**inputs)
            return output
        if self.wants_outputs:
            with torch.no_grad():
                self.outputs[number] = self.model(**inputs)
        return None if self.grad_scale is None else self._loss(inputs, number, self.grad_scale)

    def _loss(self, inputs: dict[str, Any], number: int, grad_scale: float) -> Tensor:
        labels = self.micro_batches.labels(number)
        result = self.criterion(inputs, labels, grad_scale)
        self.sums += sums_by_type(result, labels, self.micro_batches.type_ids(number), self.types)
        return result.loss_sum


def in_flight(hidden: Tensor | None, output: Tensor) -> InFlight:
    """What to keep of an F that took ``hidden`` and gave ``output``."""
    edge = get_gradient_edge(output) if output.requires_grad else None  # not where everything before it is frozen
    return InFlight(hidden, edge, (tuple(output.shape), output.dtype))


def backward(kept: InFlight, grad_output: Tensor, defer: bool) -> Tensor | None:
    """The gradient of the chunk's input, if it has one; those of its parameters are added to theirs, but with
    ``defer`` those of weights are left to :func:`weight_gradients`."""
    hidden, edge = kept.hidden, kept.edge
    kept.hidden = kept.edge = None
    if edge is not None:
        if defer:
            with deferring() as kept.tasks:
                torch.autograd.backward((edge,), (grad_output,))
        else:
            torch.autograd.backward((edge,), (grad_output,))
    return None if hidden is None else hidden.grad


def weight_gradients(kept: InFlight) -> None:
    """Add the gradients that :func:`backward` has left."""
    while kept.tasks:
        kept.tasks.pop(0)()
