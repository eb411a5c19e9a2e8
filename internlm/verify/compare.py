"""How far a run on several ranks may be from that on one process, by type.

What ranks sent, against the formula. Pure.

Two sets of records → a report. Pure: no process is started, nothing is read or printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from internlm.config import Config
from internlm.core.parallel.ledger import Entry, sum_traffic
from internlm.costs import expected_traffic
from internlm.verify.record import RankRecord
from internlm.verify.tensors import Assembled, Disagreement, Trace, assemble, relative, relative_l2, trace


@dataclass(frozen=True)
class Limits:
    """Largest relative differences; of tensors in the L2 norm. What several ranks hold must be equal bit by bit."""

    first_loss: float
    first_norm: float
    """Global gradient norm."""
    losses: float
    """Of the steps after the first."""
    norms: float
    gradients: float
    """Each, of the first step."""
    parameters: float
    """Each, after the last step."""
    modules: float
    """From which on a module's output is said to differ; no part of the verdict, for whatever matters of it shows in
    loss and gradients."""


#: In half precision the limits are those of layouts that round alike (data parallelism, ZeRO).
LIMITS = {
    "torch.float64": Limits(1e-12, 1e-12, 1e-10, 1e-10, 1e-11, 1e-10, 1e-11),
    "torch.float32": Limits(1e-6, 1e-6, 1e-5, 1e-4, 1e-5, 1e-4, 1e-5),
    "torch.tf32": Limits(1e-6, 1e-6, 1e-5, 1e-4, 1e-5, 1e-4, 1e-5),  # on CPU the same as float32
    "torch.bfloat16": Limits(1e-6, 1e-6, 1e-3, 1e-2, 1e-5, 5e-2, 1e-2),
    "torch.float16": Limits(1e-6, 1e-6, 1e-3, 1e-2, 1e-5, 5e-2, 1e-2),
}


@dataclass(frozen=True)
class TrafficError:
    """A collective of a mode that a rank's ledger and the formula tell differently."""

    rank: int
    step: int
    """From 1."""
    mode: str
    collective: str
    counted: Entry
    expected: Entry

    def __str__(self) -> str:
        return (
            f"{self.collective} over {self.mode}, step {self.step}, rank {self.rank}: {self.counted.calls} calls of "
            f"{self.counted.sent} bytes in all, expected {self.expected.calls} of {self.expected.sent}"
        )


def compare_traffic(config: Config, records: Sequence[RankRecord]) -> list[TrafficError] | None:
    """Every difference between the ledgers and what ``config`` makes its ranks send; None where there is no formula for
    the model."""
    try:
        return [error for rank, record in enumerate(records) for error in _of_rank(config, rank, record, len(records))]
    except KeyError:
        return None


def _of_rank(config: Config, rank: int, record: RankRecord, world_size: int) -> list[TrafficError]:
    """Step by step; all steps together where parameters are gathered as the next step needs them."""
    place, errors = record.place, []
    steps = [
        expected_traffic(config, world_size, tokens, types=record.types, stage=place.stage, zero_rank=place.zero)
        for tokens in record.tokens
    ]
    pairs = list(zip(record.traffic, steps, strict=True))
    if config.hybrid_zero_optimizer.overlap_sync_param:
        pairs = [(sum_traffic(record.traffic), sum_traffic(steps))]
    for step, (counted, expected) in enumerate(pairs, 1):
        for mode, collective in sorted({*counted, *expected}, key=str):
            pair = (each.get((mode, collective), Entry()) for each in (counted, expected))
            error = TrafficError(rank, step, mode.value, collective, *pair)
            if error.counted != error.expected:
                errors.append(error)
    return errors


GRADIENT, PARAMETER = "gradient of", "parameter"


@dataclass(frozen=True)
class Row:
    """One figure of both runs, or one tensor; nan is never within a limit."""

    name: str
    difference: float
    """Relative; of tensors in the L2 norm."""
    limit: float
    value: float | None = None
    reference: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.difference:.2g} > {self.limit:g}"


@dataclass(frozen=True)
class Report:
    """All that a comparison found. Rows of tensors have the worst first."""

    losses: list[Row]
    norms: list[Row]
    gradients: list[Row]
    parameters: list[Row]
    forward: Trace
    """Outputs of modules in the first micro-batch of each data-parallel rank."""
    backward: Trace
    """Gradients of those outputs."""
    shared: int
    """Tensors, or figures, that several ranks hold."""
    disagreements: list[Disagreement]
    holes: list[str]
    """Tensors of which some elements are held by no rank."""
    traffic: list[TrafficError] | None

    @property
    def rows(self) -> list[Row]:
        """All that has a limit."""
        return [*self.losses, *self.norms, *self.gradients, *self.parameters]

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit; none: passed."""
        return [
            *(str(row) for row in self.rows if not row.passed),
            *(f"not bitwise equal: {each}" for each in self.disagreements),
            *(f"{name}: some elements are held by no rank" for name in self.holes),
            *(f"traffic: {each}" for each in self.traffic or ()),
        ]

    @property
    def passed(self) -> bool:
        """The verdict."""
        return not self.failures


def compare(config: Config, reference: RankRecord, ranks: Sequence[RankRecord]) -> Report:
    """``ranks``: what each rank recorded of ``config``; ``reference``: what one process did, of as many parts as there
    are data-parallel ranks (see :func:`internlm.verify.run.run_rank`)."""
    limits = LIMITS[str(config.model.dtype)]
    gradients, parameters = assemble([r.gradients for r in ranks]), assemble([r.parameters for r in ranks])
    wanted_gradients, wanted_parameters = assemble([reference.gradients]), assemble([reference.parameters])
    return Report(
        _figures("loss", ranks[0].losses, reference.losses, limits.first_loss, limits.losses),
        _figures("gradient norm", ranks[0].norms, reference.norms, limits.first_norm, limits.norms),
        _tensors(GRADIENT, gradients.wholes, wanted_gradients.wholes, limits.gradients),
        _tensors(PARAMETER, parameters.wholes, wanted_parameters.wholes, limits.parameters),
        trace(reference, ranks, lambda each: each.outputs, limits.modules),
        trace(reference, ranks, lambda each: each.gradients, limits.modules),
        gradients.shared + parameters.shared,
        [*_unequal_figures(ranks), *_named(PARAMETER, parameters), *_named(GRADIENT, gradients)],
        [*(f"{PARAMETER} {name}" for name in parameters.holes), *(f"{GRADIENT} {name}" for name in gradients.holes)],
        compare_traffic(config, ranks),
    )


def _figures(name: str, values: Sequence[float], references: Sequence[float], first: float, others: float) -> list[Row]:
    return [
        Row(f"{name} of step {step}", relative(value, reference), first if step == 1 else others, value, reference)
        for step, (value, reference) in enumerate(zip(values, references, strict=True), 1)
    ]


def _tensors(kind: str, tensors: Mapping[str, Tensor], references: Mapping[str, Tensor], limit: float) -> list[Row]:
    """The worst first; a tensor that only one of the runs has is infinitely far off."""
    rows = []
    for name in {**references, **tensors}:
        both = name in tensors and name in references
        difference = relative_l2(tensors[name], references[name]) if both else math.inf
        rows.append(Row(f"{kind} {name}", difference, limit))
    return sorted(rows, key=lambda row: math.inf if math.isnan(row.difference) else row.difference, reverse=True)


def _unequal_figures(ranks: Sequence[RankRecord]) -> Iterator[Disagreement]:
    """Loss and gradient norm are the same number on every rank."""
    for name, figures in (("loss", [r.losses for r in ranks]), ("gradient norm", [r.norms for r in ranks])):
        for step, values in enumerate(zip(*figures, strict=True), 1):
            other = next((rank for rank, value in enumerate(values) if not _same(value, values[0])), None)
            if other is not None:
                yield Disagreement(f"{name} of step {step}", other, 1, abs(values[other] - values[0]))


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _named(kind: str, assembled: Assembled) -> Iterator[Disagreement]:
    return (replace(each, name=f"{kind} {each.name}") for each in assembled.disagreements)
