"""Format the report of a comparison as text, or as JSON with all numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from internlm.config import Config, masked_dict
from internlm.core.context.parallel_context import sizes_of
from internlm.verify.compare import Report, Row
from internlm.verify.configs import Plan
from internlm.verify.tensors import ModuleTrace

#: Rows shown of each table.
WORST = 5


def heading(plan: Plan) -> str:
    """Return a one-line heading with the model, dtype, seed, device, number of ranks and parallel layout."""
    config, sizes = plan.config, sizes_of(plan.config, plan.world_size)
    sizes_by_name = {"tensor": sizes.tensor, "weight": sizes.weight, "zero1": sizes.zero}
    layout = ", ".join(
        [
            config.parallel.tensor.mode,
            *(f"{name} {size}" for name, size in sizes_by_name.items() if size > 1),
            *_pipeline(config),
        ]
    )
    batches = f"{plan.data_size} x {config.data.micro_num} micro-batches"
    model = f"{config.model_type}, {config.model.dtype}, seed {plan.seed}, on {plan.device_type}"
    return f"{model}: {plan.world_size} rank{'s' * (plan.world_size > 1)} ({layout}; {batches}) against one process"


def _pipeline(config: Config) -> Iterator[str]:
    """Yield a description of stages, chunks per stage and schedule, if there is a pipeline."""
    pipeline, chunks = config.parallel.pipeline, config.model.num_chunks
    if pipeline.size * chunks > 1:
        table = f" by {pipeline.table}" if pipeline.table else ""
        yield f"pipeline {pipeline.size} x {chunks} {pipeline.mode}{table}"


def as_text(report: Report) -> str:
    """Format a report as text of at most a page: the worst rows of each table, and the verdict."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{'':<24} {'ranks':<22} {'one process':<22} {'difference':<10}"
    yield from (_format_metric(row) for pair in zip(report.losses, report.norms, strict=True) for row in pair)
    yield from _format_tensors("gradients of step 1, relative L2", report.gradients)
    yield from _format_tensors(f"parameters after step {len(report.losses)}, relative L2", report.parameters)
    yield _format_modules("forward, outputs", report.forward)
    yield _format_modules("backward, gradients of outputs", report.backward)
    yield from _format_list(f"stored by several ranks: {report.shared} tensors", "bitwise equal", report.disagreements)
    yield from _format_list("complete", "every element is on a rank", report.holes)
    if report.traffic is None:
        yield "traffic: no formula for this model"
    else:
        yield from _format_list("traffic", "equal to the formula", report.traffic)
    yield from _format_verdict(report)


def _format_metric(row: Row) -> str:
    mark = "" if row.passed else f"  > {row.limit:g}"
    return f"{row.name:<24} {row.value!r:<22} {row.reference!r:<22} {row.difference:<10.2g}{mark}"


def _format_tensors(title: str, rows: Sequence[Row]) -> Iterator[str]:
    over = [row for row in rows if not row.passed]
    yield f"{title}: {len(over)} of {len(rows)} over {rows[0].limit:g}; worst:"
    for row in rows[:WORST]:
        yield f"  {row.difference:<10.2g} {row.name}"


def _format_modules(title: str, trace: ModuleTrace) -> str:
    not_joined = len(trace.differences) - len(trace.compared)
    count = f"{len(trace.compared)} compared" + (f", {not_joined} not comparable" if not_joined else "")
    if trace.first is None:
        return f"modules {title}: none differs by more than {trace.limit:g} ({count}; worst {trace.worst:.2g})"
    after = f", right after {trace.last_equal}, which agrees" if trace.last_equal is not None else ""
    return f"modules {title}: first to differ is {trace.first} ({trace.differences[trace.first]:.2g}{after}; {count})"


def _format_list(title: str, good: str, bad: Sequence[object]) -> Iterator[str]:
    yield f"{title}, {len(bad)} wrong:" if bad else f"{title}: {good}"
    yield from (f"  {entry}" for entry in bad[:WORST])


def _format_verdict(report: Report) -> Iterator[str]:
    yield "PASS" if report.passed else f"FAIL, {len(report.failures)} checks failed:"
    yield from (f"  {failure}" for failure in report.failures[:WORST])
    if len(report.failures) > WORST:
        yield f"  ... and {len(report.failures) - WORST} more"


def as_json(plan: Plan, report: Report, location: Mapping[str, Any] | None = None) -> str:
    """Format plan, report and the location of a mistake as JSON, with non-finite numbers as text (``"nan"``)."""
    run_info = {
        "passed": report.passed,
        "failures": report.failures,
        "world_size": plan.world_size,
        "data_size": plan.data_size,
        "steps": plan.steps,
        "seed": plan.seed,
        "device": plan.device_type,
        "config": masked_dict(plan.config),
    }
    found = asdict(report)
    found["forward"]["first"], found["backward"]["first"] = report.forward.first, report.backward.first
    return json.dumps(_finite({**run_info, **found, "location": location}), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    # JSON has no non-finite numbers, and most parsers refuse Python's NaN.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
