"""Search for the first tensor that differs from one process, in order of execution.

The order is that of a step: initial values, the inputs of the model, the forward passes, the backward passes, the
reduced gradients, their norm, the update. :mod:`internlm.verify.walk` walks along the tensors of the passes,
:mod:`internlm.verify.gradient_parts` explains gradients.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from internlm.verify.compare import GRADIENT, PARAMETER, Report, Row
from internlm.verify.gradient_parts import explain_gradient
from internlm.verify.record import THE_MODEL, Call, RankRecord, Site, index_of
from internlm.verify.relations import factor_of
from internlm.verify.tensors import assemble, relative_l2
from internlm.verify.walk import Found, Walk, explain_found


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """First tensor that differs, the module that computes it, and what is wrong with it."""

    module: str
    """Name of a module, or of a part of the step, such as ``the gradient norm``."""
    phase: str
    """``initial values``, ``batch``, ``forward``, ``backward``, ``gradients``, ``loss``, ``norm``, ``update`` or
    ``communication``."""
    tensor: str
    """What differs."""
    difference: float
    after: str = ""
    """Last tensor before it that agrees."""
    explanation: str = ""
    """What is wrong, if a simple relation between the values of the ranks and of one process says so."""
    calls: list[str] = field(default_factory=list)
    """Collectives that were called there."""

    def __str__(self) -> str:
        return f"{self.module}, {self.phase}"


def find_culprit(report: Report, reference: RankRecord, ranks: Sequence[RankRecord]) -> Culprit | None:
    """Return the first tensor that differs and what is wrong with it; None if no tensor differs.

    Args:
        report: Comparison of the records.
        reference: Record of one process, with details.
        ranks: Record of each rank, with details.
    """
    found = next(_culprits(report, reference, ranks), None)
    if found is None or found.explanation:
        return found
    return replace(found, explanation=_by_traffic(report))


def _by_traffic(report: Report) -> str:
    """Say which collectives are missing in a step, or called too often, by the formula of its traffic."""
    differences = {
        (error.collective, error.mode): error.counted.calls - error.expected.calls for error in report.traffic or ()
    }
    return ", ".join(
        f"{abs(count)} x {collective} over {mode}: {'missing' if count < 0 else 'too many'} in the step"
        for (collective, mode), count in differences.items()
        if count
    )


def _culprits(report: Report, reference: RankRecord, ranks: Sequence[RankRecord]) -> Iterator[Culprit]:
    # In the order of a step: what is wrong first makes everything after it wrong.
    limit, step = report.forward.limit, reference.details.step if reference.details else 0
    yield from _before(reference, ranks, limit)
    walk = Walk(reference, ranks, limit)
    if (missing := walk.never_run()) is not None:
        yield Culprit(module="the schedule", phase="forward", tensor=missing, difference=1.0)
    # The weight of a token in the loss is an input of each pass, but depends on the batches of all.
    for selects in (_is_batch, _is_forward, _is_backward):
        if (found := walk.first(selects)) is not None:
            yield _of_pass(found, walk)
    if walk.unresolved and any(not row.passed for row in report.gradients):
        yield _of_pass(walk.unresolved[0], walk)
    wrong = {row.name.removeprefix(f"{GRADIENT} "): row.difference for row in report.gradients if not row.passed}
    yield from _gradients(wrong, reference, ranks)
    yield from _metrics(report, report.losses[step : step + 1] + report.sums * (step == 0), "the loss", "loss")
    norm = _explain_norm(report, reference, ranks)
    yield from _metrics(report, report.norms[step : step + 1], "the gradient norm", "norm", norm)
    # After the norm: the gradients were divided by it, so ranks that disagree on it have other bits.
    names = (each.name for each in report.disagreements if each.name.startswith(GRADIENT))
    yield from _gradients({name.removeprefix(f"{GRADIENT} "): 0.0 for name in names}, reference, ranks)
    yield from _update(report, reference, ranks)
    yield from _metrics(report, report.losses + report.norms, "the update", "update")
    yield from _communication(report, ranks)


def _before(reference: RankRecord, ranks: Sequence[RankRecord], limit: float) -> Iterator[Culprit]:
    """Yield the first parameter that differs before the recorded step."""
    if reference.details is None or any(record.details is None for record in ranks):
        return
    step = reference.details.step
    wanted = assemble([reference.details.initial]).tensors
    found = assemble([record.details.initial for record in ranks if record.details])
    wrong = {each.name: str(each) for each in found.disagreements}
    for name in reference.details.order:
        difference = relative_l2(found.tensors[name], wanted[name]) if name in found.tensors else math.inf
        # Initial values are a function of seed and name, whatever the layout: they are equal bit by bit.
        if difference > (limit if step else 0) or name in wrong:
            yield Culprit(
                module=module_of(name),
                phase="update" if step else "initial values",
                tensor=f"parameter {name} after step {step}" if step else f"initial values of {name}",
                difference=difference,
                explanation=wrong.get(name) or _same_as(found.tensors.get(name), wanted),
            )


def _same_as(values: Tensor | None, others: Mapping[str, Tensor]) -> str:
    if values is None:
        return "no rank has them"
    varied = values.min() < values.max()  # ones and zeros are those of many
    return next((f"they are those of {name}" for name, other in others.items() if varied and _same(values, other)), "")


def _same(a: Tensor, b: Tensor) -> bool:
    return relative_l2(a, b) == 0


def module_of(parameter: str) -> str:
    """Return the name of the module that has a parameter, by the parameter's logical name."""
    return parameter.rpartition(".")[0] or THE_MODEL


# -- forward and backward ---------------------------------------------------------------------------------------------
def _is_batch(site: Site) -> bool:
    return site.is_batch


def _is_forward(site: Site) -> bool:
    return not site.is_gradient


def _is_backward(site: Site) -> bool:
    return site.is_gradient


def _of_pass(found: Found, walk: Walk) -> Culprit:
    site, after = found.site, found.after
    return Culprit(
        module=_module(found),
        phase=_phase(site),
        tensor=f"{site} of {site.module or THE_MODEL}" + found.where,
        difference=found.difference,
        after=f"{after} of {after.module or THE_MODEL}" if after else "",
        explanation=explain_found(found, walk),
        calls=[_in_words(call) for call in found.calls],
    )


def _phase(site: Site) -> str:
    if site.is_batch:
        return "batch"
    if not site.module and site.is_input and not site.is_gradient:
        return "loss"
    return "backward" if site.is_gradient else "forward"


def _module(found: Found) -> str:
    """Return the module whose code computes the tensor that was found, or the part of the step outside of modules."""
    site = found.site
    if site.is_input == site.is_gradient:
        return site.module or THE_MODEL
    if not site.module:
        return {"loss": "the loss", "batch": "the batch"}.get(_phase(site), THE_MODEL)
    if found.crosses_stages and found.after is not None:
        ends = (site.module, found.after.module) if site.is_gradient else (found.after.module, site.module)
        return f"the pipeline between {ends[0]} and {ends[1]}"
    return found.caller or THE_MODEL


def _in_words(call: Call) -> str:
    return f"{call.collective} over {call.mode}"


# -- after the passes -------------------------------------------------------------------------------------------------
def _gradients(wrong: Mapping[str, float], reference: RankRecord, ranks: Sequence[RankRecord]) -> Iterator[Culprit]:
    """Yield the first of the gradients that are wrong, in the order in which a backward pass computes them."""
    order = reference.details.order if reference.details else list(wrong)
    found = [name for name in reversed(order) if name in wrong]
    for name in found[:1]:
        more = f" (and {len(found) - 1} others)" if len(found) > 1 else ""
        yield Culprit(
            module=module_of(name),
            phase="gradients",
            tensor=f"gradient of {name}{more}",
            difference=wrong[name],
            after="all tensors of the passes",
            explanation=explain_gradient(name, reference, ranks),
            calls=_calls_outside(ranks),
        )


def _calls_outside(ranks: Sequence[RankRecord]) -> list[str]:
    """Return the collectives that ranks call outside of the passes, each once."""
    calls = (call for record in ranks if record.details for call in record.details.calls)
    # With overlap, buckets are reduced while the last backward pass runs.
    inside = (call for record in ranks for each in record.passes for call in each.calls)
    of_gradients = (call for call in inside if call.collective.startswith("reduce") or call.mode != "tensor")
    return list(dict.fromkeys(map(_in_words, (*calls, *of_gradients))))


def _metrics(report: Report, rows: Sequence[Row], module: str, phase: str, explanation: str = "") -> Iterator[Culprit]:
    """Yield the first metric that differs from that of one process, or between ranks."""
    for row in rows:
        unequal = next((str(each) for each in report.disagreements if each.name == row.name), "")
        if row.passed and not unequal:
            continue
        if not row.passed and row.value is not None and row.reference:
            explanation = explanation or f"it is multiplied by {row.value / row.reference:.6g}"
        yield Culprit(
            module=module, phase=phase, tensor=row.name, difference=row.difference, explanation=explanation or unequal
        )


def _explain_norm(report: Report, reference: RankRecord, ranks: Sequence[RankRecord]) -> str:
    """Say which gradients explain the difference between the squares of the norms."""
    row = report.norms[reference.details.step if reference.details else 0]
    if row.passed or not row.value or not row.reference:
        return ""
    gradients = assemble([reference.gradients]).tensors
    squares = {f"the gradient of {name}": _square(gradient) for name, gradient in gradients.items()}
    copied = [name for name in gradients if sum(_has_whole(record, name) for record in ranks) > 1]
    squares["every gradient that several ranks hold"] = sum(_square(gradients[name]) for name in copied)
    # The square of the norm is a sum over parameters, so what counts too often or not at all is a term of it.
    extra, tolerance = row.value**2 - row.reference**2, 1e-9 * row.reference**2
    for name, square in squares.items():
        for times in (1, -1, 2, 3):
            if square > 10 * tolerance and abs(extra - times * square) <= tolerance:
                return f"{name} counts {times + 1} times"
    return f"its square is multiplied by {(row.value / row.reference) ** 2:.6g}"


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def _has_whole(record: RankRecord, name: str) -> bool:
    shards = record.parameters.get(name)
    return shards is not None and any(values.shape == shards.shape for values in shards.slices.values())


def _update(report: Report, reference: RankRecord, ranks: Sequence[RankRecord]) -> Iterator[Culprit]:
    """Yield the first parameter that differs after the last step although its gradients agree."""
    wrong = {row.name.removeprefix(f"{PARAMETER} "): row.difference for row in report.parameters if not row.passed}
    unequal = [each for each in report.disagreements if each.name.startswith(PARAMETER)]
    names = [*wrong, *(each.name.removeprefix(f"{PARAMETER} ") for each in unequal)]
    order = reference.details.order if reference.details else names
    for name in [name for name in order if name in names][:1]:
        more = f" (and {len(set(names)) - 1} others)" if len(set(names)) > 1 else ""
        yield Culprit(
            module=module_of(name),
            phase="update",
            tensor=f"parameter {name}{more}",
            difference=wrong.get(name, 0.0),
            after="gradients and their norm",
            explanation=_explain_update(name, reference, ranks),
            calls=_calls_outside(ranks),
        )


def _explain_update(name: str, reference: RankRecord, ranks: Sequence[RankRecord]) -> str:
    if reference.details is None:
        return ""
    before, after = (assemble([shards]).tensors[name] for shards in (reference.details.initial, reference.parameters))
    # An all-gather that a rank missed leaves the values from before the update.
    stale = []
    for rank, record in enumerate(ranks):
        for offsets, values in record.parameters[name].slices.items() if name in record.parameters else ():
            index = index_of(offsets, values)
            if not _same(before[index], after[index]) and _same(values, before[index]):
                stale.append(rank)
    if stale:
        listed = ", ".join(map(str, dict.fromkeys(stale)))
        return f"rank {listed} still has the values from before the update: an all-gather is missing"
    found = assemble([record.parameters for record in ranks])
    factor = factor_of(found.tensors[name] - before, after - before, 1e-6)
    if factor is not None and abs(factor - 1) > 1e-6 and before.dtype == torch.float64:
        return f"the update is multiplied by {factor:.6g}"
    return next((str(each) for each in found.disagreements if each.name == name), "")


def _communication(report: Report, ranks: Sequence[RankRecord]) -> Iterator[Culprit]:
    """Yield the module that calls a collective more often than the traffic formula says, although all values agree."""
    for error in report.traffic or ():
        by_pass = [
            [call for call in each.calls if (call.mode, call.collective) == (error.mode, error.collective)]
            for each in ranks[error.rank].passes
        ]
        too_many = error.counted.calls > error.expected.calls
        twice = [call.module for calls in by_pass for call in _repeated(calls) if too_many]
        counts = Counter(call.module or THE_MODEL for calls in by_pass for call in calls)
        yield Culprit(
            module=(twice[0] or THE_MODEL) if twice else "the step",
            phase="communication",
            tensor="no tensor differs",
            difference=0.0,
            explanation=f"{'it sends what is sent twice: ' * bool(twice)}{error}",
            calls=[f"{count} in {module}" for module, count in counts.items()],
        )


def _repeated(calls: Sequence[Call]) -> Iterator[Call]:
    """Yield each call of a pass that is given the same tensor as another one of the same direction."""
    for one, other in combinations(calls, 2):
        if one.sent is None or other.sent is None or one.in_backward != other.in_backward:
            continue
        # Tensors of one value, such as the zeros of new biases, are equal by chance.
        if one.sent.numel() > 1 and one.sent.min() < one.sent.max() and one.sent.equal(other.sent):
            yield one
