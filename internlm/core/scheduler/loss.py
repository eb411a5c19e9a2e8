"""The loss of a micro-batch, whatever kind of model makes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from internlm.ops import TokenLoss, cross_entropy


class TokenCrossEntropy:
    """Cross-entropy of each token against its label.

    A model whose ``forward`` takes ``labels`` computes the loss itself (ours do, chunk by chunk); any other returns
    logits.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.takes_labels = "labels" in inspect.signature(model.forward).parameters

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor, grad_scale: float) -> TokenLoss:
        """``loss_sum`` of the result is ``grad_scale`` times the sum of the token losses."""
        options = {"label_smoothing": self.label_smoothing, "grad_scale": grad_scale}
        if self.takes_labels:
            result: TokenLoss = self.model(**inputs, labels=labels, **options)
            return result
        logits = self.model(**inputs)
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
