"""Evaluate a model on held-out data, by dataset type and in total.

All dataset types share batches and sums: a type costs neither a pass over the model of its own nor a collective.

Shapes: K dataset types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from internlm.accelerator import to_device, to_host
from internlm.core.parallel.collectives import all_reduce
from internlm.core.scheduler import Scheduler, TrainingStep
from internlm.core.scheduler.loss import CORRECT, LOSS, TOKENS
from internlm.core.scheduler.schedulers import Batch
from internlm.data.loader import ValidLoader
from internlm.data.tokenizer import bytes_of_tokens, load_tokenizer
from internlm.data.valid_rows import read_together

BYTES = 4  # row of the sums after those of a step


class Evaluated(Protocol):
    """Protocol for what is evaluated, such as a trainer: a model and the scheduler that runs it."""

    model: nn.Module
    scheduler: Scheduler


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one dataset type, or of all together, over their valid tokens; NaN if there are none."""

    loss_sum: float  # nats
    correct: int  # tokens whose label was the most probable one
    tokens: int  # labels other than -100
    bytes: int | None  # of text that the labels stand for; None: unknown

    @property
    def loss(self) -> float:
        """Mean cross entropy of a token in nats, without label smoothing."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the tokens whose label was the most probable one."""
        return self.correct / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of :attr:`loss`; of a loss over 700, that of 700, since a larger exponent overflows."""
        return math.exp(min(self.loss, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float | None:
        """Cross entropy of the text in bits per byte, which does not depend on the tokenizer; None: bytes unknown."""
        if self.bytes is None:
            return None
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else math.nan


def evaluate(
    trainer: Evaluated,
    loaders: Mapping[str, Iterable[Batch]],
    token_bytes: Tensor | None = None,
    ends_early: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Compute loss, accuracy, perplexity and bits per byte over the valid tokens of all loaders.

    Collective: all ranks must call it, and each loader must yield the same number of batches on every rank.

    Args:
        trainer: Trainer of the model. The model runs in evaluation mode and is set to training mode at the end.
        loaders: Validation loaders by dataset type.
        token_bytes: Bytes of text of each token id, as :func:`token_bytes_of` returns them; None: unknown.
        ends_early: Function called before each batch, on all ranks, with one result on all of them; if it returns
            True, the evaluation ends without metrics.

    Returns:
        ``valid/loss``, ``valid/acc``, ``valid/perplexity`` and, with ``token_bytes``, ``valid/bits_per_byte`` in
        total, and with suffix ``/{type}`` for each dataset type.
    """
    total, by_type = measure(trainer, loaders, token_bytes, ends_early)
    metrics = _metrics("", total) if by_type else {}
    for name, measured in by_type.items():
        metrics |= _metrics(f"/{name}", measured)
    return metrics


def measure(
    trainer: Evaluated,
    loaders: Mapping[str, Iterable[Batch]],
    token_bytes: Tensor | None = None,
    ends_early: Callable[[], bool] | None = None,
) -> tuple[Measured, dict[str, Measured]]:
    """Measure a model on all loaders, as :func:`evaluate` does.

    Returns:
        Measurements of all dataset types together, and by dataset type; equal on all ranks. Without loaders, or after
        an early end, there are none by dataset type.
    """
    nothing = _measured([0.0] * 5, with_bytes=token_bytes is not None), dict[str, Measured]()
    if not loaders:
        return nothing
    scheduler, types = trainer.scheduler, len(loaders)
    # In fp64, because the number of batches is unlimited. The device never waits for the host between batches.
    sums = torch.zeros(4, types, dtype=torch.float64, device=scheduler.device)
    counts = torch.zeros(types, dtype=torch.float64)
    # Dropout and label smoothing are off in evaluation mode.
    trainer.model.eval()
    for batch in _typed_batches(loaders):
        if ends_early is not None and ends_early():
            trainer.model.train()
            return nothing
        result = scheduler.forward_backward_step(
            trainer, iter([batch]), forward_only=True, training=TrainingStep(types=types)
        )
        sums += result.sums
        if token_bytes is not None:
            counts += _bytes_by_type(batch, token_bytes, types)
    trainer.model.train()
    # The sums of a step are those of all ranks already; each stage of a pipeline has read the same labels.
    counts = all_reduce(to_device(counts, scheduler.device), scheduler.data_group)
    rows = to_host(torch.cat([sums, counts[None]]), "validation")  # [5, K]
    has_bytes = token_bytes is not None
    by_type = {name: _measured(column.tolist(), has_bytes) for name, column in zip(loaders, rows.T, strict=True)}
    return _measured(rows.sum(1).tolist(), has_bytes), by_type


def token_bytes_of(tokenizer_path: str, vocab_size: int) -> Tensor:
    """Return the bytes of text that each token id stands for, int64 [vocab_size]; special tokens stand for none.

    Raises:
        DataError: There is no tokenizer at ``tokenizer_path``, or it cannot be read.
    """
    known = torch.as_tensor(bytes_of_tokens(load_tokenizer(tokenizer_path)))[:vocab_size]
    sizes = torch.zeros(vocab_size, dtype=torch.int64)  # a vocabulary may be padded
    sizes[: len(known)] = known
    return sizes


def _typed_batches(loaders: Mapping[str, Iterable[Batch]]) -> Iterator[Batch]:
    """Yield the batches of all loaders, with the index of their loader as ``type_ids``."""
    valid_loaders = [loader for loader in loaders.values() if isinstance(loader, ValidLoader)]
    if len(valid_loaders) == len(loaders):
        yield from read_together(valid_loaders)
        return
    for index, loader in enumerate(loaders.values()):
        for inputs, labels in loader:
            yield {**inputs, "type_ids": torch.full_like(labels, index)}, labels


def _bytes_by_type(batch: Batch, token_bytes: Tensor, types: int) -> Tensor:
    """Return the bytes of text of this rank's valid labels by dataset type, float64 [K], on the host."""
    inputs, labels = batch
    valid = labels != -100
    sizes = token_bytes[labels[valid]].double()
    return torch.bincount(inputs["type_ids"].view_as(labels)[valid], weights=sizes, minlength=types)


def _measured(sums: list[float], with_bytes: bool) -> Measured:
    correct, tokens = round(sums[CORRECT]), round(sums[TOKENS])
    return Measured(
        loss_sum=sums[LOSS], correct=correct, tokens=tokens, bytes=round(sums[BYTES]) if with_bytes else None
    )


def _metrics(suffix: str, measured: Measured) -> dict[str, float]:
    metrics = {
        f"valid/loss{suffix}": measured.loss,  # NaN rather than 0, which would look like a perfect model
        f"valid/acc{suffix}": measured.accuracy,
        f"valid/perplexity{suffix}": measured.perplexity,
    }
    if measured.bits_per_byte is not None:
        metrics[f"valid/bits_per_byte{suffix}"] = measured.bits_per_byte
    return metrics
