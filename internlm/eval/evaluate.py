"""Evaluate a model on held-out data, by dataset type and in total."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from internlm.accelerator import to_host
from internlm.core.scheduler.loss import CORRECT, LOSS, TOKENS
from internlm.core.trainer import Batch, Trainer


def evaluate(trainer: Trainer, loaders: Mapping[str, Iterable[Batch]]) -> dict[str, float]:
    """Compute loss, accuracy and perplexity over the valid tokens of all loaders.

    Collective: all ranks must call it, and each loader must yield the same number of batches on every rank.

    Args:
        trainer: Trainer of the model. The model runs in evaluation mode and is set to training mode at the end.
        loaders: Validation loaders by dataset type.

    Returns:
        ``valid/loss``, ``valid/acc`` and ``valid/perplexity`` in total, and with suffix ``/{type}`` for each dataset
        type.
    """
    trainer.eval()
    by_loader = [_totals(trainer, loader) for loader in loaders.values()]
    trainer.train()
    if not by_loader:
        return {}
    # Read once, after the last batch, so that the device never waits for the host.
    totals = to_host(torch.stack(by_loader), "validation")
    metrics = _metrics("", totals.sum(0))
    for name, sums in zip(loaders, totals, strict=True):
        metrics |= _metrics(f"/{name}", sums)
    return metrics


def _totals(trainer: Trainer, loader: Iterable[Batch]) -> torch.Tensor:
    """Return the four sums of a step's result (see :class:`StepResult`) over a loader, [4], on the device."""
    # Sums rather than means, because batches differ in their number of valid tokens; in fp64, because the number of
    # batches is unlimited.
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.scheduler.device)
    for batch in loader:
        result = trainer.execute_schedule(iter([batch]), forward_only=True)
        sums += result.sums.sum(1)
    return sums


def _metrics(suffix: str, sums: torch.Tensor) -> dict[str, float]:
    tokens = float(sums[TOKENS])
    if not tokens:  # a loss of 0 would look like a perfect model
        return {f"valid/{name}{suffix}": math.nan for name in ("loss", "acc", "perplexity")}
    loss = float(sums[LOSS]) / tokens
    return {
        f"valid/loss{suffix}": loss,
        f"valid/acc{suffix}": float(sums[CORRECT]) / tokens,
        f"valid/perplexity{suffix}": math.exp(min(loss, 700.0)),  # a larger exponent overflows
    }
