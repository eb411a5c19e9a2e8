"""Loss of a micro-batch, for any model; weights of its tokens, and sums over a step for the metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from internlm.accelerator import HostValues
from internlm.core.context.group import Group
from internlm.core.parallel.collectives import all_reduce
from internlm.core.parallel.communicator import IDENTITY_HEAD, HeadCommunicator
from internlm.ops import TokenLoss, cross_entropy
from internlm.utils.compat import AsTuple
from internlm.utils.errors import Problem, UserError

LOSS, CORRECT, TOKENS, WEIGHTED = range(4)  # rows of the sums


class StepResult(AsTuple):
    """Result of one step: mean loss, sums by dataset type and, if requested, outputs.

    It unpacks to ``(outputs, labels, loss)``, each None if not requested. There, ``loss`` is a scalar on the device.
    The sums stay on the device until ``loss`` or ``valid_tokens`` is used for the first time, which is a host sync.

    Args:
        sums: [4, types], float64: sum of token losses, correct predictions, valid tokens, and sum of token losses times
            the weights of their micro-batches, for each dataset type, over all ranks.
        outputs: Outputs of each micro-batch, if requested; in a pipeline, only on the rank with the head.
        labels: Labels of each micro-batch, if requested.
        local_loss: Sum of the token losses of this rank alone, a scalar; None: no loss was computed, and ``loss`` is
            NaN.
    """

    def __init__(
        self,
        sums: Tensor,
        outputs: Sequence[Tensor] = (),
        labels: Sequence[Tensor] = (),
        local_loss: Tensor | None = None,
    ) -> None:
        self.sums, self.outputs, self.labels, self.has_loss = sums, list(outputs), list(labels), local_loss is not None
        self.host_sums = HostValues(sums, "loss")
        self.local_loss = HostValues(sums.new_zeros(()) if local_loss is None else local_loss, "loss of this rank")

    def as_tuple(self) -> tuple[list[Tensor] | None, list[Tensor] | None, Tensor | None]:
        """Return ``(outputs, labels, loss)``, without a host sync."""
        loss = self.sums[WEIGHTED].sum() / self.sums[TOKENS].sum().clamp(min=1)
        return self.outputs or None, self.labels or None, loss if self.has_loss else None

    @cached_property
    def loss(self) -> float:
        """Loss that the step minimises, the average by ``loss.average``, equal on every rank; NaN if not computed."""
        if not self.has_loss:
            return float("nan")
        sums = self.host_sums.read()
        tokens = sum(sums[TOKENS])
        return math.fsum(sums[WEIGHTED]) / tokens if tokens else 0.0

    @property
    def valid_tokens(self) -> int:
        """Number of labels other than −100, over all ranks."""
        return int(sum(self.host_sums.read()[TOKENS]))


def zero_sums(types: int, device: torch.device) -> Tensor:
    """Return zeros in which a step sums its losses and token counts by dataset type, [4, types], float64.

    :class:`StepResult` describes the rows.
    """
    # Float64: a sum of a million token losses in fp32 loses the digits that a comparison of layouts needs.
    return torch.zeros(4, types, dtype=torch.float64, device=device)


def sums_by_type(result: TokenLoss, labels: Tensor, type_ids: Tensor, types: int, weight: Tensor) -> Tensor:
    """Return the sums of one micro-batch (see :class:`StepResult`), [4, types], float64.

    Args:
        result: Token losses and correct predictions of the micro-batch, [T].
        labels: Labels, [T] or any shape with T elements; −100 is ignored.
        type_ids: Dataset type of each token, shaped like ``labels``.
        types: Number of dataset types.
        weight: Weight of the token losses of this micro-batch, a float64 scalar.
    """
    valid = labels.flatten() != -100
    columns = torch.stack([result.token_loss, result.correct & valid, valid]).double()  # [3, T]
    # A product with one-hot types replaces scatter_add, which is not deterministic on CUDA.
    one_hot = type_ids.flatten()[:, None] == torch.arange(types, device=type_ids.device)  # [T, types]
    sums = columns @ one_hot.double()
    return torch.cat([sums, sums[LOSS, None] * weight])


def token_weights(
    valid_tokens: Tensor, data_group: Group, micro_batch_group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weights of token losses, with which the loss is the sum of weight · token loss over N.

    The loss is the mean over the N valid tokens of the global batch, so all weights are 1. Or, with a
    ``micro_batch_group``, it is the mean over the M micro-batches that have valid tokens of the mean over the n valid
    tokens of each, so the weight of a token is N / (M · n). Collective over both groups.

    Args:
        valid_tokens: Number of valid labels that this rank holds of each micro-batch, [micro-batches].
        data_group: Ranks that hold different tokens of the global batch.
        micro_batch_group: Ranks that hold different tokens of the same micro-batches.

    Returns:
        Weight of each micro-batch, [micro-batches], and N (at least 1), a scalar; both float64.
    """
    if micro_batch_group is None:
        total = all_reduce(valid_tokens.sum(), data_group).clamp(min=1).double()
        return torch.ones(len(valid_tokens), dtype=torch.float64, device=valid_tokens.device), total
    whole = all_reduce(valid_tokens.clone(), micro_batch_group).clamp(min=1).double()
    # The shares of all ranks in a micro-batch add up to 1.
    counts = torch.stack([valid_tokens.sum().double(), (valid_tokens / whole).sum()])
    total, micro_batches = all_reduce(counts, data_group).clamp(min=1)
    return total / (micro_batches * whole), total


class TokenCrossEntropy:
    """Cross-entropy between the logits of a model and the labels.

    A model whose ``forward`` takes ``labels`` computes the loss itself. The built-in models do so in chunks of tokens,
    because the logits of all tokens would take too much memory. Any other model returns logits.

    Args:
        model: Model to run.
        label_smoothing: Weight of the uniform distribution in the targets, 0 to 1; 0 in evaluation mode.

    Raises:
        UserError: The model returns logits that do not match the labels of this rank.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.takes_labels = "labels" in inspect.signature(model.forward).parameters
        if not self.takes_labels:
            _check_logits(model)

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor, grad_scale: Tensor | float) -> TokenLoss:
        """Run the model and return its token losses.

        Args:
            inputs: Inputs of the model, by name.
            labels: Label of each token; −100 is ignored.
            grad_scale: Factor on ``loss_sum`` of the result, but not on its ``token_loss``; a scalar tensor on the
                device, or a number.
        """
        # Smoothing regularises training; a validation measures the cross entropy with the labels themselves.
        smoothing = self.label_smoothing if self.model.training else 0.0
        options: dict[str, Any] = {"label_smoothing": smoothing, "grad_scale": grad_scale}
        if self.takes_labels:
            with checking_forward(self.model, [*inputs, "labels", *options]):
                result = self.model(**inputs, labels=labels, **options)
            if not isinstance(result, TokenLoss):
                todo = "Return one, or remove labels from the arguments and return logits"
                raise _unexpected_output(self.model, "a TokenLoss (internlm.ops), since it takes labels", result, todo)
            return result
        with checking_forward(self.model, inputs):
            logits = self.model(**inputs)
        if not isinstance(logits, Tensor) or logits.shape[:-1].numel() != labels.numel():
            expected = f"logits [{', '.join(map(str, labels.shape))}, vocabulary]"
            raise _unexpected_output(self.model, expected, logits, "Return the logits of each token, as one tensor")
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


@contextmanager
def checking_forward(model: nn.Module, arguments: Collection[str]) -> Iterator[None]:
    """Convert a TypeError in the ``with`` block into an error in words, if ``model`` does not take ``arguments``.

    Raises:
        UserError: ``model.forward`` does not take the keywords ``arguments``, or requires others.
    """
    try:
        yield
    except TypeError:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(**dict.fromkeys(arguments))
        except TypeError:
            message = f"expected forward({', '.join(arguments)}), got forward{signature}"
            todo = "Take the fields of a batch as keywords, those that the model does not need too"
            raise UserError(Problem(f"{type(model).__name__}.forward", message, todo)) from None
        raise


def _unexpected_output(model: nn.Module, expected: str, output: object, todo: str) -> UserError:
    got = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    return UserError(Problem(f"{type(model).__name__}.forward", f"expected {expected}, got {got}", todo))


def _check_logits(model: nn.Module) -> None:
    """Check that the logits of ``model`` cover the whole vocabulary, for the tokens whose labels this rank has.

    Raises:
        UserError: The logits are split over the vocabulary, or include tokens whose labels other ranks have.
    """
    for name, module in model.named_modules():
        comm = getattr(module, "communicator", None)
        if isinstance(comm, HeadCommunicator) and comm is not IDENTITY_HEAD:
            # With a split vocabulary a rank has the labels of all tokens, so logits must be gathered over entries;
            # with split tokens it has the labels of its own tokens, so logits must stay split.
            wrong = comm.vocab is not None
            if module.parallel_output == wrong:
                expected, got = "the whole vocabulary", "this rank's vocabulary entries"
                if not wrong:
                    expected, got = "this rank's tokens", "all tokens"
                message = f"expected logits of {expected} for the loss, got those of {got} (parallel_output={wrong})"
                todo = f"Let forward take labels and return {name}.loss(x, labels), or set parallel_output={not wrong}"
                raise UserError(Problem(f"head '{name}' of the model", message, todo))
