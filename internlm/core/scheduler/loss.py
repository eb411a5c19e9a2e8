"""What running the schedule over one step's micro-batches gives; the same form whatever was asked for.

The loss of a micro-batch, whatever kind of model makes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.parallel.communicator import IDENTITY_HEAD, HeadCommunicator
from internlm.ops import TokenLoss, cross_entropy
from internlm.utils.errors import Problem, UserError

LOSS, CORRECT, TOKENS = range(3)  # rows of the sums


@dataclass(frozen=True)
class StepResult:
    """Loss and sums of one step."""

    #: Mean over the valid tokens of the global batch: the same number on every rank.
    loss: float
    #: [3, types], float64: summed token loss, correct predictions and valid tokens of each data-set type, over all
    #: ranks.
    sums: Tensor
    #: Outputs and labels of each micro-batch, where they were asked for; of a pipeline, on the rank of the head.
    outputs: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    @property
    def valid_tokens(self) -> int:
        """Labels that counted, over all ranks."""
        return int(self.sums[TOKENS].sum())


def no_sums(types: int, device: torch.device) -> Tensor:
    """The sums of nothing."""
    return torch.zeros(3, types, dtype=torch.float64, device=device)


def sums_by_type(result: TokenLoss, labels: Tensor, type_ids: Tensor, types: int) -> Tensor:
    """[3, types] of one micro-batch. ``labels`` and ``type_ids``: [T].

    A product with the one-hot types rather than a scattered sum, for that is deterministic on every device.
    """
    valid = labels.flatten() != -100
    columns = torch.stack([result.token_loss, result.correct & valid, valid]).double()  # [3, T]
    return columns @ F.one_hot(type_ids.flatten(), types).double()


def _check_logits(model: nn.Module) -> None:
    """A model that returns logits must return those of all words for its rank's labels."""
    for name, module in model.named_modules():
        comm = getattr(module, "communicator", None)
        if isinstance(comm, HeadCommunicator) and comm is not IDENTITY_HEAD:
            wrong = comm.vocab is not None  # labels are those of all tokens; else those of this rank's
            if module.parallel_output == wrong:
                what = f"gives logits that the loss can't use in this parallel mode (parallel_output={wrong})"
                todo = f"Let forward take labels and return {name}.loss(x, labels), or set parallel_output={not wrong}"
                raise UserError(Problem(f"model '{name}'", what, todo))


class TokenCrossEntropy:
    """Cross-entropy of each token against its label.

    A model whose ``forward`` takes ``labels`` computes the loss itself (ours do, chunk by chunk); any other returns
    logits.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.takes_labels = "labels" in inspect.signature(model.forward).parameters
        if not self.takes_labels:
            _check_logits(model)

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor, grad_scale: float) -> TokenLoss:
        """``loss_sum`` of the result is ``grad_scale`` times the sum of the token losses."""
        options = {"label_smoothing": self.label_smoothing, "grad_scale": grad_scale}
        if self.takes_labels:
            result: TokenLoss = self.model(**inputs, labels=labels, **options)
            return result
        logits = self.model(**inputs)
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
