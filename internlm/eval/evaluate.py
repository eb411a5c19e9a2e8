"""Loss on held-out data, per type and in total."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from internlm.core.scheduler.loss import CORRECT, LOSS, TOKENS
from internlm.core.trainer import Batch, Trainer


def evaluate(trainer: Trainer, loaders: Mapping[str, Iterable[Batch]]) -> dict[str, float]:
    """``valid/loss``, ``valid/acc`` and ``valid/perplexity``, each also with ``/{type}``: means over valid tokens.

    All ranks must call it; each loader gives every rank the same number of batches.
    """
    trainer.eval()
    totals = {name: _totals(trainer, loader) for name, loader in loaders.items()}
    trainer.train()
    figures = _figures("", torch.stack(list(totals.values())).sum(0)) if totals else {}
    for name, sums in totals.items():
        figures |= _figures(f"/{name}", sums)
    return figures


def _totals(trainer: Trainer, loader: Iterable[Batch]) -> torch.Tensor:
    """[3]: summed loss, correct predictions, valid tokens."""
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in loader:
        result = trainer.execute_schedule(iter([batch]), forward_only=True)
        sums += result.sums.sum(1).cpu()
    return sums


def _figures(suffix: str, sums: torch.Tensor) -> dict[str, float]:
    tokens = float(sums[TOKENS])
    if not tokens:  # nothing to predict is no perfect score
        return {f"valid/{name}{suffix}": math.nan for name in ("loss", "acc", "perplexity")}
    loss = float(sums[LOSS]) / tokens
    return {
        f"valid/loss{suffix}": loss,
        f"valid/acc{suffix}": float(sums[CORRECT]) / tokens,
        f"valid/perplexity{suffix}": math.exp(min(loss, 700.0)),
    }
