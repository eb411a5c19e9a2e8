"""Divide the step of ours and that of ``transformers`` into GEMMs, attention and everything else.

``python -m bench.shares [--yardstick bench-30M] [--dtype bfloat16] [--rounds 6]``. Both live in one process and take
turns under torch's profiler. Where both call the same kernels for GEMMs and attention, their time bounds what either
can gain over the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from bench.ours import Ours
from bench.transformers_peer import Transformers
from bench.yardsticks import YARDSTICKS
from internlm.accelerator import processor

WARMUP = 3  # steps
#: Kinds by a part of an operator's name; an operator calls others only of its own kind.
KINDS = {"attention": "scaled_dot_product", "GEMMs": "mm", "GEMMs by oneDNN": "linear_pointwise"}
REST = "everything else"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", choices=YARDSTICKS, default="bench-30M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    yardstick = YARDSTICKS[args.yardstick]
    sides = {
        "ours": Ours(yardstick, [f"model.dtype=torch.{args.dtype}"]).step,
        "transformers": Transformers(yardstick, args.dtype).step,
    }
    for step in sides.values():
        for _ in range(WARMUP):
            step()
    rounds = [{name: shares(step) for name, step in sides.items()} for _ in range(args.rounds)]
    print(f"{processor.processor_name()} ({processor.processor_type()})")
    print(f"{yardstick.name}, {args.dtype}, {args.threads} thread(s), medians of {args.rounds} rounds, ms\n")
    print("| | " + " | ".join(sides) + " |\n|---|--:|--:|")
    for kind in (*KINDS, REST, "step"):
        times = [1e3 * median(by_side[name][kind] for by_side in rounds) for name in sides]
        if any(times):
            print(f"| {kind} | " + " | ".join(f"{value:.0f}" for value in times) + " |")


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Run a step under the profiler; return its seconds by kind, and as a whole."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    seconds = dict.fromkeys(KINDS, 0.0)
    for operator in profiler.key_averages():
        kind = next((kind for kind, part in KINDS.items() if part in operator.key), None)
        if kind is not None and operator.key.startswith(("aten::", "mkldnn::")):
            seconds[kind] += operator.self_cpu_time_total / 1e6
    return {**seconds, REST: whole - sum(seconds.values()), "step": whole}


if __name__ == "__main__":
    main()
