"""Time the training step and print JSON.

``python -m bench.train_step [--yardstick bench-30M] [--steps 20] [--threads 2]``
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch

from bench.floor import floor_seconds, gemm_flops_per_second
from bench.ours import Ours
from bench.yardsticks import YARDSTICKS
from internlm.costs.flops import model_flops_per_token
from internlm.profiler.reports import peak_rss_bytes

WARMUP = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--yardstick", choices=YARDSTICKS, default="bench-30M")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    yardstick = YARDSTICKS[args.yardstick]
    ours = Ours(yardstick)
    seconds = [_timed(ours) for _ in range(WARMUP + args.steps)][WARMUP:]
    rss = peak_rss_bytes()  # before the floor allocates for itself
    step = median(seconds)
    flops = model_flops_per_token(ours.config.model, yardstick.seq_len) * yardstick.tokens / step
    floors = {
        gemms: floor_seconds(ours.config.model, yardstick.tokens, gemms == "plain") for gemms in ("plain", "ours")
    }
    rates = {gemms: gemm_flops_per_second(gemms == "plain") for gemms in floors}
    print(
        json.dumps(
            {
                "yardstick": yardstick.name,
                "tokens_per_second": round(yardstick.tokens / step, 1),
                "ms_per_step": round(step * 1e3, 1),
                "peak_rss_mb": round(rss / 2**20),
                "model_gflops_per_second": round(flops / 1e9, 1),
                **{f"of_gemm_rate_{gemms}": round(flops / rate, 3) for gemms, rate in rates.items()},
                **{f"gemm_rate_gflops_{gemms}": round(rate / 1e9) for gemms, rate in rates.items()},
                **{f"gemm_floor_ms_{gemms}": round(floor * 1e3, 1) for gemms, floor in floors.items()},
                **{f"step_over_floor_{gemms}": round(step / floor, 3) for gemms, floor in floors.items()},
                "threads": args.threads,
                "torch": torch.__version__,
            },
            indent=1,
        )
    )


def _timed(ours: Ours) -> float:
    start = time.perf_counter()
    ours.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
