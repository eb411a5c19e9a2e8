"""Time and peak memory of initialising one rank's share of a model: ``python bench/init.py [--threads 1]``.

Each row is one layout of configs/7B_internlm2.py in a process of its own, which builds what rank 0 holds and draws its
initial values. No other rank runs. Memory is the growth of the peak resident set beyond the imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "7B_internlm2.py"
MIB = 2**20

#: Overrides by number of ranks.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "8 ranks, tensor 8": (8, ("parallel.tensor.size=8",)),
    "64 ranks, tensor 8, pipeline 8": (64, ("parallel.tensor.size=8", "parallel.pipeline.size=8", "data.micro_num=8")),
    "8 ranks, isp, weight 8": (8, ("parallel.tensor.mode=isp", "parallel.weight.size=8")),
    "64 ranks, isp, weight 64": (64, ("parallel.tensor.mode=isp", "parallel.weight.size=64")),
}


def measure(layout: str, threads: int) -> dict[str, float | int]:
    """Build and initialise the share of rank 0 in this process."""
    import torch

    from internlm.config import load_config
    from internlm.core.parallel.sharding import GroupPosition, Sharding
    from internlm.costs.stages import stage_layers_of
    from internlm.train.build_model import build_model

    torch.set_num_threads(threads)
    world, overrides = LAYOUTS[layout]
    config = load_config(CONFIG, overrides, world, "cpu")
    tensor, weight = config.parallel.tensor, config.parallel.weight
    sharding = Sharding(tensor.mode, GroupPosition(0, tensor.size), GroupPosition(0, weight.size))
    before, start, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    model = build_model(config, seed=1024, sharding=sharding, stage_layers=stage_layers_of(config, stage=0))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    elements = sum(parameter.numel() for parameter in model.parameters())
    shard = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    return {
        "elements": elements,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "elements_per_cpu_second": round(elements / cpu),
        "shard_mib": round(shard, 1),
        "peak_growth_mib": round(_peak_mib() - before, 1),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    """Measure every layout and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, help="measure this one alone, in this process")
    args = parser.parse_args()
    if args.layout:
        print(json.dumps(measure(args.layout, args.threads)))
        return
    rows = {}
    for layout in LAYOUTS:
        command = [sys.executable, __file__, "--layout", layout, "--threads", str(args.threads)]
        rows[layout] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
