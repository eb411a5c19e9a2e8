"""What running the schedule over one step's micro-batches gives; the same form whatever was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.ops import TokenLoss

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
