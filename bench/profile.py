"""Print where the time of a training step goes, and how far it is from the sum of its GEMMs.

``python -m bench.profile [--yardstick bench-30M] [--dtype bfloat16] [--threads 2] [--steps 10]``, or
``make bench-profile``. The first table has the time of operators by kind, from torch's profiler, and what is left of a
step: Python, autograd and the profiler itself. The second has GEMMs and attention alone, each with the fastest of its
kernels; they take turns with whole steps, since the speed of a shared machine drifts.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.floor import ATTENTION, ROLES, Floor
from bench.ours import Ours
from bench.yardsticks import YARDSTICKS
from internlm.accelerator import processor
from internlm.costs.flops import model_flops_per_token
from internlm.ops import gemm
from internlm.ops.cpu import kernel_choice
from internlm.profiler.reports import peak_rss_bytes

WARMUP, PROFILED = 3, 3  # steps
TARGET = 1.35  # of a step to its GEMMs
#: Kinds by a part of the name of a profiler range; an operator has the kind of the innermost range that has one.
KINDS = {
    **{f"GEMM: {role}": f"GEMM: {role}" for role in ROLES},
    "AttentionForCpuBackward": "attention: backward",
    "_BlockedAttentionBackward": "attention: backward",
    "aten::scaled_dot_product": "attention: forward",
    "_BlockedAttention": "attention: forward",
    "_LinearCrossEntropy": "elementwise: loss",
    "_RMSNorm": "elementwise: norm",
    "_SplitQKVRotary": "elementwise: rotary",
    "_Gated": "elementwise: swiglu",
    "optimizer": "optimizer",
}
OTHER, REST = "elementwise: sums, copies, embedding", "Python and autograd"
_OPERATORS = ("aten::", "mkldnn::", "c10d::")


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Measurements of a step; times in seconds."""

    seconds: float  # median of steps without the profiler
    profiled_seconds: float  # mean of steps under the profiler
    by_kind: dict[str, float]  # of a step under the profiler
    calls: Counter[str]  # outermost operators of a step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", choices=YARDSTICKS, default="bench-30M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    yardstick = YARDSTICKS[args.yardstick]
    ours = Ours(yardstick, [f"model.dtype=torch.{args.dtype}"])
    for _ in range(WARMUP):
        ours.step()
    rss = peak_rss_bytes()  # before the parts alone allocate for themselves
    floor = Floor(ours.config.model, yardstick, getattr(torch, args.dtype))
    measured = profile_step(ours, floor, args.steps)
    flops = model_flops_per_token(ours.config.model, yardstick.seq_len) * yardstick.tokens
    print(f"{processor.processor_name()} ({processor.processor_type()})")
    print(f"{yardstick.name}, {args.dtype}, {args.threads} thread(s), torch {torch.__version__}")
    print(f"kernels: {kernel_choice.summary(kernel_choice.current())}")
    print(
        f"step: {measured.seconds * 1e3:.0f} ms, {yardstick.tokens / measured.seconds:.0f} tokens/s, "
        f"{flops / measured.seconds / 1e9:.0f} GFLOP/s of model operations, peak RSS {rss / 2**20:.0f} MB\n"
    )
    print("\n".join(kind_table(measured)))
    print("\n".join(floor_table(measured, floor.seconds())))


def profile_step(ours: Ours, floor: Floor, steps: int) -> StepProfile:
    """Time steps without the profiler, in turns with the floor, then divide a few with it into kinds."""
    seconds = []
    floor.turn()  # oneDNN compiles in its first
    for _ in range(steps):
        seconds.append(_timed(ours.step))
        floor.turn()
    with _named_ranges(ours), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        profiled = sum(_timed(ours.step) for _ in range(PROFILED)) / PROFILED
    by_kind: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in profiler.events() or []:
        if _is_outermost_operator(event):
            kind = _kind(event)
            by_kind[kind] += event.cpu_time_total / 1e6 / PROFILED
            calls[kind] += 1
    by_kind[REST] = profiled - sum(by_kind.values())
    per_step = Counter({kind: count // PROFILED for kind, count in calls.items()})
    return StepProfile(seconds=median(seconds), profiled_seconds=profiled, by_kind=dict(by_kind), calls=per_step)


def kind_table(measured: StepProfile) -> list[str]:
    """Format the time of a step by kind, as lines of Markdown."""
    lines = ["| kind | ms | share | operators |", "|---|--:|--:|--:|"]
    for kind in dict.fromkeys([*KINDS.values(), OTHER, REST]):
        seconds = measured.by_kind.get(kind, 0.0)
        share = seconds / measured.profiled_seconds
        lines.append(f"| {kind} | {seconds * 1e3:.1f} | {share:.1%} | {measured.calls[kind] or ''} |")
    return [*lines, f"| step under the profiler | {measured.profiled_seconds * 1e3:.1f} | | |", ""]


def floor_table(measured: StepProfile, floor: dict[str, float]) -> list[str]:
    """Format GEMMs and attention alone against those of the step, as lines of Markdown, and the step against them."""
    lines = ["| | in the step, ms | alone, fastest kernel, ms | ratio |", "|---|--:|--:|--:|"]
    for role, alone in floor.items():
        name = role if role == ATTENTION else f"GEMM: {role}"
        inside = sum(seconds for kind, seconds in measured.by_kind.items() if kind.startswith(name))
        lines.append(f"| {name} | {inside * 1e3:.1f} | {alone * 1e3:.1f} | {inside / alone:.2f} |")
    gemms = sum(floor[role] for role in ROLES)
    both, step = gemms + floor[ATTENTION], measured.seconds
    return [
        *lines,
        "",
        f"step / its GEMMs alone ({gemms * 1e3:.0f} ms): {step / gemms:.2f} (to reach: ≤ {TARGET})",
        f"step / its GEMMs and attention alone ({both * 1e3:.0f} ms): {step / both:.2f}",
    ]


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextmanager
def _named_ranges(ours: Ours) -> Iterator[None]:
    """Give the GEMMs and the optimizer step ranges in the profile while the block runs."""
    optimizer = ours.trainer.optimizer
    functions = [(gemm, name, f"GEMM: {role}") for name, role in zip(_GEMMS, ROLES, strict=True)]
    functions.append((optimizer, "step", "optimizer"))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
    for owner, name, label in functions:
        setattr(owner, name, _ranged(getattr(owner, name), label))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


_GEMMS = ("linear", "grad_input", "accumulate_grad_weight")


def _ranged(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return call


def _is_outermost_operator(event: FunctionEvent) -> bool:
    if not event.name.startswith(_OPERATORS):
        return False
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_OPERATORS):
            return False
        parent = parent.cpu_parent
    return True


def _kind(event: FunctionEvent | None) -> str:
    """Return the kind of an operator: that of the innermost range around it that has one."""
    while event is not None:
        for part, kind in KINDS.items():
            if part in event.name:
                return kind
        event = event.cpu_parent
    return OTHER


if __name__ == "__main__":
    main()
