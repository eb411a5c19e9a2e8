"""A report as text for people, and as JSON with every number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from internlm.config import Config
from internlm.core.context.parallel_context import sizes_of
from internlm.verify.compare import Report, Row
from internlm.verify.configs import Plan
from internlm.verify.tensors import Trace

#: Rows shown of each table.
WORST = 5


def heading(plan: Plan) -> str:
    """What is compared with what."""
    config, sizes = plan.config, sizes_of(plan.config, plan.world_size)
    named = {"tensor": sizes.tensor, "weight": sizes.weight, "zero1": sizes.zero}
    layout = ", ".join(
        [
            config.parallel.tensor.mode,
            *(f"{name} {size}" for name, size in named.items() if size > 1),
            *_pipeline(config),
        ]
    )
    batches = f"{plan.data_size} x {config.data.micro_num} micro-batches"
    model = f"{config.model_type}, {config.model.dtype}, seed {plan.seed}"
    return f"{model}: {plan.world_size} ranks ({layout}; {batches}) against one process"


def _pipeline(config: Config) -> Iterator[str]:
    """Stages, chunks of each, and what they run."""
    pipeline, chunks = config.parallel.pipeline, config.model.num_chunks
    if pipeline.size * chunks > 1:
        table = f" by {pipeline.table}" if pipeline.table else ""
        yield f"pipeline {pipeline.size} x {chunks} {pipeline.mode}{table}"


def as_text(report: Report) -> str:
    """A page at most: the worst rows of each table, and the verdict."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{'':<24} {'ranks':<22} {'one process':<22} {'difference':<10}"
    yield from (_figure(row) for pair in zip(report.losses, report.norms, strict=True) for row in pair)
    yield from _tensors("gradients of step 1, relative L2", report.gradients)
    yield from _tensors(f"parameters after step {len(report.losses)}, relative L2", report.parameters)
    yield _modules("forward, outputs", report.forward)
    yield _modules("backward, gradients of outputs", report.backward)
    yield from _listed(f"held by several ranks: {report.shared} tensors", "bitwise equal", report.disagreements)
    yield from _listed("complete", "every element is held", report.holes)
    if report.traffic is None:
        yield "traffic: no formula for this model"
    else:
        yield from _listed("traffic", "as by the formula", report.traffic)
    yield from _verdict(report)


def _figure(row: Row) -> str:
    mark = "" if row.passed else f"  > {row.limit:g}"
    return f"{row.name:<24} {row.value!r:<22} {row.reference!r:<22} {row.difference:<10.2g}{mark}"


def _tensors(title: str, rows: Sequence[Row]) -> Iterator[str]:
    over = [row for row in rows if not row.passed]
    yield f"{title}: {len(over)} of {len(rows)} over {rows[0].limit:g}; worst:"
    for row in rows[:WORST]:
        yield f"  {row.difference:<10.2g} {row.name}"


def _modules(title: str, trace: Trace) -> str:
    apart = len(trace.differences) - len(trace.compared)
    count = f"{len(trace.compared)} compared" + (f", {apart} not comparable" if apart else "")
    if trace.first is None:
        return f"modules {title}: none differs by more than {trace.limit:g} ({count}; worst {trace.worst:.2g})"
    after = f", right after {trace.last_equal}, which agrees" if trace.last_equal is not None else ""
    return f"modules {title}: first to differ is {trace.first} ({trace.differences[trace.first]:.2g}{after}; {count})"


def _listed(title: str, good: str, bad: Sequence[object]) -> Iterator[str]:
    yield f"{title}, {len(bad)} wrong:" if bad else f"{title}: {good}"
    yield from (f"  {each}" for each in bad[:WORST])


def _verdict(report: Report) -> Iterator[str]:
    yield "PASS" if report.passed else f"FAIL, beyond {len(report.failures)} limits:"
    yield from (f"  {each}" for each in report.failures[:WORST])
    if len(report.failures) > WORST:
        yield f"  ... and {len(report.failures) - WORST} more"


def as_json(plan: Plan, report: Report) -> str:
    """Everything; numbers that are not finite are text (``"nan"``, ``"inf"``)."""
    facts = {
        "passed": report.passed,
        "failures": report.failures,
        "world_size": plan.world_size,
        "data_size": plan.data_size,
        "steps": plan.steps,
        "seed": plan.seed,
        "config": plan.config.model_dump(mode="json"),
    }
    traces = {
        name: {"first": each.first} for name, each in (("forward", report.forward), ("backward", report.backward))
    }
    found = asdict(report)
    for name, more in traces.items():
        found[name] |= more
    return json.dumps(_finite({**facts, **found}), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
