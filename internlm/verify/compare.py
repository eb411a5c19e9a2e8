"""Comparison of the training records of several ranks with the record of one process.

Tensors and metrics must agree within :data:`LIMITS`. The traffic in the ledger of each rank must equal the result of
the traffic formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from internlm.config import Config
from internlm.core.parallel.ledger import Entry, sum_traffic
from internlm.costs import NoCostFormulaError, expected_traffic
from internlm.train.inventory import build_inventory
from internlm.verify.record import RankRecord
from internlm.verify.tensors import Disagreement, ModuleTrace, assemble, relative, relative_l2, trace_modules


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest allowed relative differences from the one-process reference; for tensors, in the L2 norm.

    Values that several ranks store must be bitwise equal on these ranks, whatever the limits.
    """

    first_loss: float
    first_norm: float
    """Limit for the global gradient norm in the first step."""
    losses: float
    """Limit for the loss of each step after the first."""
    norms: float
    """Limit for the global gradient norm of each step after the first."""
    gradients: float
    """Limit for each gradient in the first step."""
    parameters: float
    """Limit for each parameter after the last step."""
    modules: float
    """Limit above which the report names a module. It does not affect the verdict: a relevant error in the output of a
    module also shows in the loss and the gradients."""

    @property
    def of_later_steps(self) -> Limits:
        """Limits for tensors of a step after the first, whose parameters differ by rounding already."""
        return replace(
            self,
            first_loss=self.losses,
            first_norm=self.norms,
            gradients=10 * self.parameters,
            modules=10 * self.parameters,
        )


def _limits(
    exact: float, *, losses: float, norms: float, gradients: float, parameters: float, modules: float
) -> Limits:
    return Limits(
        first_loss=exact,
        first_norm=exact,
        losses=losses,
        norms=norms,
        gradients=gradients,
        parameters=parameters,
        modules=modules,
    )


# Adam divides a gradient by its own size, so an element whose gradient is mostly rounding moves by the learning rate in
# a direction that rounding decides. One such element (gradient 5e-8 among 9e-3) made a tensor of 1024 differ by 1.3e-4.
_SINGLE = _limits(1e-6, losses=1e-5, norms=1e-4, gradients=1e-5, parameters=1e-3, modules=1e-5)
_HALF = _limits(1e-6, losses=1e-3, norms=1e-2, gradients=1e-5, parameters=5e-2, modules=1e-2)

#: Limits by ``model.dtype``. Those of half precision hold for layouts with equal rounding (data parallelism, ZeRO):
#: where layers are split, partial sums are rounded before they are added.
LIMITS = {
    "torch.float64": _limits(1e-12, losses=1e-10, norms=1e-10, gradients=1e-11, parameters=1e-10, modules=1e-11),
    "torch.float32": _SINGLE,
    "torch.tf32": _HALF,  # products have 10 bits of mantissa, as in float16; the CPU computes it in float32
    "torch.bfloat16": _HALF,
    "torch.float16": _HALF,
}


@dataclass(frozen=True, kw_only=True)
class TrafficError:
    """Difference between a rank's ledger and the traffic formula, in the calls or bytes of one collective."""

    rank: int
    step: int
    """Index of the step, counted from 1. If ``overlap_sync_param`` is set, 1 stands for all steps together."""
    mode: str
    collective: str
    counted: Entry
    expected: Entry

    def __str__(self) -> str:
        return (
            f"{self.collective} over {self.mode}, step {self.step}, rank {self.rank}: expected {self.expected.calls} "
            f"calls ({self.expected.sent} bytes), got {self.counted.calls} ({self.counted.sent} bytes)"
        )


def compare_traffic(config: Config, records: Sequence[RankRecord]) -> list[TrafficError] | None:
    """Return the differences between the ranks' ledgers and the traffic formula; None if the model has no formula."""
    try:
        return [error for rank in range(len(records)) for error in _traffic_errors(config, rank, records)]
    except NoCostFormulaError:
        return None


def _traffic_errors(config: Config, rank: int, records: Sequence[RankRecord]) -> list[TrafficError]:
    record = records[rank]
    at, errors = record.coordinates, list[TrafficError]()
    inventory = build_inventory(config, len(records), at.stage)
    steps = [expected_traffic(inventory, tokens, types=record.types, zero_rank=at.zero) for tokens in record.tokens]
    pairs = list(zip(record.traffic, steps, strict=True))
    if config.hybrid_zero_optimizer.overlap_sync_param:
        # Parameters are gathered as the next step needs them: only the sums over all steps are defined.
        pairs = [(sum_traffic(record.traffic), sum_traffic(steps))]
    for step, (counted, expected) in enumerate(pairs, 1):
        for mode, collective in sorted({*counted, *expected}, key=str):
            ours, theirs = (traffic.get((mode, collective), Entry()) for traffic in (counted, expected))
            if ours != theirs:
                error = TrafficError(
                    rank=rank, step=step, mode=mode.value, collective=collective, counted=ours, expected=theirs
                )
                errors.append(error)
    return errors


# Names of rows; a parameter and its gradient have the same logical name.
GRADIENT, PARAMETER = "gradient of", "parameter"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Difference in one metric or tensor between a parallel run and a run of one process; NaN exceeds every limit."""

    name: str
    difference: float
    """Relative difference; for tensors, in the L2 norm."""
    limit: float
    value: float | None = None
    reference: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.difference:.2g} > {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of comparing a run on several ranks with the run of one process.

    ``gradients`` and ``parameters`` have a row per tensor, sorted by difference, the largest first.
    """

    losses: list[Row]
    norms: list[Row]
    sums: list[Row]
    """Rows for summed loss, correct predictions and valid tokens, with the largest difference of any dataset type.
    Only the first step is compared: later, rounding of parameters may change which vocabulary entry is predicted."""
    gradients: list[Row]
    parameters: list[Row]
    forward: ModuleTrace
    """Differences of module outputs from the one-process run, in the first micro-batch of each data-parallel rank."""
    backward: ModuleTrace
    """Differences of the gradients of module outputs from the one-process run, in the first micro-batch of each
    data-parallel rank."""
    shared: int
    """Number of gradients and parameters with elements that several ranks store."""
    disagreements: list[Disagreement]
    holes: list[str]
    """Names of tensors with elements that no rank stores."""
    traffic: list[TrafficError] | None
    """Differences from the traffic formula. None: the model has no formula."""

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the report."""
        return [*self.losses, *self.norms, *self.sums, *self.gradients, *self.parameters]

    @property
    def failures(self) -> list[str]:
        """One line per failed check."""
        return [
            *(str(row) for row in self.rows if not row.passed),
            *(f"not bitwise equal: {disagreement}" for disagreement in self.disagreements),
            *(f"{name}: no rank stores some of its elements" for name in self.holes),
            *(f"traffic: {error}" for error in self.traffic or ()),
        ]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return not self.failures


def compare(config: Config, reference: RankRecord, ranks: Sequence[RankRecord], limits: Limits | None = None) -> Report:
    """Compare a run on several ranks with the run of one process.

    Args:
        config: Config of the ranks.
        reference: Record of one process, whose ``passes`` has one entry for each data-parallel rank (see ``parts`` of
            :func:`internlm.verify.run.run_rank`).
        ranks: Record of each rank.
        limits: Largest differences (default: those of the dtype).
    """
    limits = limits or LIMITS[str(config.model.dtype)]
    gradients, parameters = assemble([r.gradients for r in ranks]), assemble([r.parameters for r in ranks])
    wanted_gradients, wanted_parameters = assemble([reference.gradients]), assemble([reference.parameters])
    return Report(
        losses=_metric_rows("loss", ranks[0].losses, reference.losses, limits.first_loss, limits.losses),
        norms=_metric_rows("gradient norm", ranks[0].norms, reference.norms, limits.first_norm, limits.norms),
        sums=_sum_rows(ranks[0].sums, reference.sums, limits.first_loss),
        gradients=_tensor_rows(GRADIENT, gradients.tensors, wanted_gradients.tensors, limits.gradients),
        parameters=_tensor_rows(PARAMETER, parameters.tensors, wanted_parameters.tensors, limits.parameters),
        forward=trace_modules(reference, ranks, lambda watched: watched.outputs, limits.modules),
        backward=trace_modules(reference, ranks, lambda watched: watched.gradients, limits.modules),
        shared=gradients.shared + parameters.shared,
        disagreements=[
            *_metric_disagreements(ranks),
            *_with_prefix(PARAMETER, parameters.disagreements),
            *_with_prefix(GRADIENT, gradients.disagreements),
        ],
        holes=[
            *(f"{PARAMETER} {name}" for name in parameters.holes),
            *(f"{GRADIENT} {name}" for name in gradients.holes),
        ],
        traffic=compare_traffic(config, ranks),
    )


def _metric_rows(
    name: str, values: Sequence[float], references: Sequence[float], first: float, others: float
) -> list[Row]:
    return [
        Row(
            name=f"{name} of step {step}",
            difference=relative(value, reference),
            limit=first if step == 1 else others,
            value=value,
            reference=reference,
        )
        for step, (value, reference) in enumerate(zip(values, references, strict=True), 1)
    ]


#: Rows of ``StepResult.sums``.
SUMMED = "summed loss", "correct predictions", "valid tokens"


def _sum_rows(sums: Sequence[Sequence[float]], references: Sequence[Sequence[float]], limit: float) -> list[Row]:
    rows = []
    for name, values, wanted in zip(SUMMED, sums, references, strict=True):
        differences = [relative(value, reference) for value, reference in zip(values, wanted, strict=True)]
        worst = next(filter(math.isnan, differences), max(differences))
        rows.append(Row(name=f"{name} by dataset type, step 1", difference=worst, limit=limit))
    return rows


def _tensor_rows(
    prefix: str, tensors: Mapping[str, Tensor], references: Mapping[str, Tensor], limit: float
) -> list[Row]:
    """Return one row per tensor, the worst first; the difference of a tensor that only one run has is inf."""
    rows = []
    for name in {**references, **tensors}:
        both = name in tensors and name in references
        difference = relative_l2(tensors[name], references[name]) if both else math.inf
        rows.append(Row(name=f"{prefix} {name}", difference=difference, limit=limit))
    return sorted(rows, key=lambda row: math.inf if math.isnan(row.difference) else row.difference, reverse=True)


def _metric_disagreements(ranks: Sequence[RankRecord]) -> Iterator[Disagreement]:
    """Yield a disagreement for each metric that differs between ranks, although it is reduced over all of them."""
    metrics = (
        ("loss", [r.losses for r in ranks]),
        ("gradient norm", [r.norms for r in ranks]),
        ("sums over dataset types", [[sum(map(sum, r.sums))] for r in ranks]),
    )
    for name, by_rank in metrics:
        for step, values in enumerate(zip(*by_rank, strict=True), 1):
            other = next((rank for rank, value in enumerate(values) if not _same(value, values[0])), None)
            if other is not None:
                yield Disagreement(f"{name} of step {step}", other, 1, abs(values[other] - values[0]))


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _with_prefix(prefix: str, disagreements: Sequence[Disagreement]) -> Iterator[Disagreement]:
    return (replace(disagreement, name=f"{prefix} {disagreement.name}") for disagreement in disagreements)
