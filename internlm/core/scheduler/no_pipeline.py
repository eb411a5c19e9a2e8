"""No pipeline: micro-batches one after another, gradients accumulated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import all_reduce
from internlm.core.scheduler.loss import TokenCrossEntropy
from internlm.core.scheduler.result import LOSS, TOKENS, StepResult, sums_by_type

Batch = tuple[dict[str, Any], Tensor]
MODEL_INPUTS = ("input_ids", "cu_seqlens", "indexes")


class NonPipelineScheduler:
    """Runs the micro-batches of a step through a model that is whole on this rank.

    ``types`` is the number of data-set types; ``data_group`` joins the ranks whose
    tokens make up the global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: TokenCrossEntropy,
        types: int,
        data_group: Group,
        device: torch.device,
    ) -> None:
        self.model, self.criterion, self.types = model, criterion, types
        self.data_group, self.device = data_group, device

    def forward_backward_step(
        self,
        data_iter: Iterator[Batch],
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = False,
    ) -> StepResult:
        """Take the next batch and run it forward, and backward unless ``forward_only``.

        Gradients are those of the mean loss over the valid tokens of the *global* batch, summed (not averaged) over
        micro-batches and ranks. ``return_loss=False`` (with labels the model cannot use, say) runs the model alone,
        forward only.
        """
        batch, labels = next(data_iter)
        with torch.set_grad_enabled(not forward_only and return_loss):
            outputs = [self._outputs(batch, i) for i in range(len(labels))] if return_output_label else []
            sums = self._run(batch, labels, backward=not forward_only) if return_loss else self._no_sums()
        loss = self._mean_loss(sums) if return_loss else float("nan")
        return StepResult(loss, sums, outputs, list(labels) if return_output_label else [])

    def _run(self, batch: dict[str, Any], labels: Tensor, backward: bool) -> Tensor:
        grad_scale = 1.0 / max(self._global_valid_tokens(labels), 1)
        sums = self._no_sums()
        for i in range(len(labels)):
            micro_labels = labels[i].to(self.device)
            result = self.criterion(self._inputs(batch, i), micro_labels, grad_scale)
            sums += sums_by_type(result, micro_labels, batch["type_ids"][i].to(self.device), self.types)
            if backward:
                result.loss_sum.backward()
        return all_reduce(sums, self.data_group)

    def _no_sums(self) -> Tensor:
        return torch.zeros(3, self.types, dtype=torch.float64, device=self.device)

    def _outputs(self, batch: dict[str, Any], i: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(**self._inputs(batch, i))
        return logits

    def _inputs(self, batch: dict[str, Any], i: int) -> dict[str, Tensor]:
        return {key: batch[key][i].to(self.device, non_blocking=True) for key in MODEL_INPUTS if key in batch}

    def _global_valid_tokens(self, labels: Tensor) -> int:
        return int(all_reduce((labels != -100).sum().to(self.device), self.data_group))

    def _mean_loss(self, sums: Tensor) -> float:
        tokens = sums[TOKENS].sum()
        return float(sums[LOSS].sum() / tokens) if tokens else 0.0
