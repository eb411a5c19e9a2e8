"""Report of dry runs: each figure beside its formula, and what differs or would stall a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from internlm.core.parallel.ledger import Entry
from internlm.costs.memory_plan import ACTIVATIONS, GATHER, REDUCTION, TRANSIENTS, format_bytes
from internlm.dryrun.call_order import order_problems
from internlm.dryrun.one_rank import DryRun

#: Largest relative difference between the activations, or the peak, and the formula.
ACTIVATION_LIMIT, PEAK_LIMIT = 0.03, 0.05
#: Largest relative difference between the operations of matrix products and the formula.
FLOPS_LIMIT = 0.02
#: Rows that are measured only at the peak of the step.
_WITHIN_STEP = (GATHER, REDUCTION, TRANSIENTS)
_NONE = Entry()


def problems(runs: Sequence[DryRun]) -> list[str]:
    """Return a line for each difference from a formula, fault, and difference between ranks."""
    lines = [f"rank {run.rank}: {line}" for run in runs for check in _CHECKS for line in check(run)]
    return lines + order_problems({run.rank: run.events for run in runs})


def not_compared(run: DryRun) -> list[str]:
    """Return a line for the comparisons that were left out, with the reason."""
    left_out = ""
    if run.expected is None or ACTIVATIONS not in run.plan:
        left_out = "activations, peak, traffic and FLOP, because the model has no formulas"
    elif not run.has_attention_kernel:
        left_out = "activations, peak and FLOP, because attention does not run as one operator"
    return [f"rank {run.rank}: not compared: {left_out}"] if left_out else []


def _memory_problems(run: DryRun) -> Iterator[str]:
    for row, planned in run.plan.items():
        if row in _WITHIN_STEP:
            continue
        held = run.held.get(row, 0)
        if row == ACTIVATIONS:
            if run.has_attention_kernel and abs(held - planned) > ACTIVATION_LIMIT * planned + run.message_bytes:
                yield f"{row} take {held} bytes, {planned} by formula; they may differ by {ACTIVATION_LIMIT:.0%}"
        elif held != planned:
            yield f"{row} take {held} bytes, {planned} by formula"
    total, peak = sum(run.plan.values()), sum(run.peak.values())
    # Buffers need not be at their largest when the rest is, so the peak may be lower by their size.
    least = total * (1 - PEAK_LIMIT) - sum(run.plan.get(row, 0) for row in (GATHER, REDUCTION))
    most = total * (1 + PEAK_LIMIT) + run.message_bytes
    if run.has_attention_kernel and ACTIVATIONS in run.plan and not least <= peak <= most:
        yield f"the peak is {peak} bytes at {run.peak_place}, {total} by formula; they may differ by {PEAK_LIMIT:.0%}"


def _traffic_problems(run: DryRun) -> Iterator[str]:
    if run.expected is None:
        return
    for mode, collective in sorted({*run.traffic, *run.expected}, key=str):
        got, expected = (traffic.get((mode, collective), _NONE) for traffic in (run.traffic, run.expected))
        if got != expected:
            yield f"{mode.value} {collective}: {_entry(got)}, by formula {_entry(expected)}"


def _flops_problems(run: DryRun) -> Iterator[str]:
    flops, expected = sum(run.flops.values()), run.expected_flops
    if run.has_attention_kernel and expected is not None and abs(flops - expected) > FLOPS_LIMIT * expected:
        formula = f"{expected:.4g} by formula; they may differ by {FLOPS_LIMIT:.0%}"
        yield f"matrix products take {flops:.4g} FLOP, {formula}"


def _sync_problems(run: DryRun) -> Iterator[str]:
    if sum(run.host_reads.values()) > 1:
        reads = ", ".join(f"{why} ({count})" for why, count in sorted(run.host_reads.items()))
        yield f"a step waits more than once for the device: {reads}"
    for fault, count in run.faults.items():
        yield f"{fault} ({count} times in all steps)"


_CHECKS: Sequence[Callable[[DryRun], Iterator[str]]] = (
    _memory_problems,
    _traffic_problems,
    _flops_problems,
    _sync_problems,
)


def _entry(entry: Entry) -> str:
    return f"{entry.calls} calls, {entry.sent} bytes"


def as_text(run: DryRun) -> str:
    """Format the record of one rank as tables."""
    steps = ", ".join(f"{seconds:.1f} s" for seconds in run.step_seconds)
    lines = [
        f"rank {run.rank} of {run.world_size}, stage {run.stage}: built in {run.build_seconds:.1f} s, steps {steps}"
    ]
    lines += _table("memory", ("dry run", "formula"), [(row, *_both(run, row)) for row in {**run.plan, **run.held}])
    peak = [(category, format_bytes(size)) for category, size in run.peak.items() if size]
    peak.append(("total", format_bytes(sum(run.peak.values()))))
    lines += _table(f"peak, at {run.peak_place}", ("dry run",), peak)
    expected = run.expected or {}
    traffic = [
        (f"{mode.value} {collective}", *(_short(side.get((mode, collective))) for side in (run.traffic, expected)))
        for mode, collective in sorted({*run.traffic, *expected}, key=str)
    ]
    lines += _table("calls and MiB sent in a step", ("dry run", "formula"), traffic)
    formula = "-" if run.expected_flops is None else f"{run.expected_flops / 1e12:.3f}"
    work = [
        ("matrix products, TFLOP", f"{sum(run.flops.values()) / 1e12:.3f}", formula),
        ("matrix products", str(sum(run.kernels.get(name, 0) for name in run.flops)), "-"),
        ("kernels", str(sum(run.kernels.values())), "-"),
        ("host syncs", str(sum(run.host_reads.values())), "0 to 1"),
    ]
    return "\n".join(lines + _table("work of a step", ("dry run", "formula"), work))


def _both(run: DryRun, row: str) -> tuple[str, str]:
    held = run.held.get(row, run.peak.get(row, 0) if row in _WITHIN_STEP else None)
    return format_bytes(held), format_bytes(run.plan.get(row))


def _short(entry: Entry | None) -> str:
    return f"{entry.calls} · {entry.sent / 2**20:.3f}" if entry else "-"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a title line with headings, and a line per row: its name, and a cell for each heading."""
    width = max(40, *(len(row[0]) for row in rows), len(title)) if rows else 40
    lines = ["", f"{title:<{width}}" + "".join(f"  {heading:>20}" for heading in headings)]
    return lines + [f"{name:<{width}}" + "".join(f"  {cell:>20}" for cell in cells) for name, *cells in rows]


def as_json(runs: Sequence[DryRun]) -> str:
    """Format the records as JSON, without the lists of collectives."""
    return json.dumps({"runs": [_plain(run) for run in runs], "problems": problems(runs)}, indent=1)


def _plain(run: DryRun) -> dict[str, Any]:
    record = {name: value for name, value in vars(run).items() if name != "events"}
    for name in ("traffic", "expected"):
        traffic = getattr(run, name)
        if traffic is not None:
            record[name] = {f"{mode.value} {collective}": list(entry) for (mode, collective), entry in traffic.items()}
    return record
