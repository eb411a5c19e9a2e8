"""Race the optimizer against fused AdamW over a flat tensor, and a data-parallel step against torch's DDP.

``python -m bench.optimizer alone [--rounds 10] [--threads 2]`` and ``python -m bench.optimizer ddp [--rounds 8]`` print
JSON. Sides take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.race import DDP, Setup, race

ZERO = "hybrid_zero_optimizer"
OVERLAPS = (f"{ZERO}.overlap_sync_grad=True", f"{ZERO}.overlap_sync_param=True", f"{ZERO}.reduce_bucket_size=4194304")
SIZES = {
    "bench-30M": {},
    "300M": {"num_layers": 17, "hidden_size": 1152, "num_attention_heads": 18, "vocab_size": 16384},
}
WARMUP = 3


def flat_adamw(elements: int) -> Callable[[], object]:
    """Return a step of torch's fused AdamW over one flat tensor."""
    flat = torch.nn.Parameter(torch.randn(elements))
    flat.grad = torch.randn(elements)
    return torch.optim.AdamW([flat], lr=1e-4, fused=True).step


def ours(keys: dict[str, Any]) -> tuple[int, Callable[[float], object]]:
    """Return the elements of a model, and a step of our optimizer over it that clips to a given norm."""
    from bench.yardsticks import LLAMA_30M
    from internlm.config.schema import AdamConfig, HybridZeroConfig, ModelConfig
    from internlm.core.parallel.initialization import initialize_parameters
    from internlm.core.parallel.param_state import begin_accumulation
    from internlm.model.decoder import Decoder
    from internlm.model.families import FAMILIES, spec_of
    from internlm.solver.optimizer import HybridZeroOptimizer

    config = ModelConfig(**{"vocab_size": 8192, **LLAMA_30M, **keys, "num_kv_attention_heads": None})
    model = Decoder(spec_of(FAMILIES["LLAMA2"], config))
    initialize_parameters(model, 0)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-4))
    for flat in optimizer.groups:
        flat.grads.normal_()

    def step(clip: float) -> None:
        optimizer.config = HybridZeroConfig(clip_grad_norm=clip)
        optimizer.begin_step()
        for parameter in model.parameters():
            begin_accumulation(parameter)  # the gradients stay, as if backward passes had written them
        optimizer.step(1e-4, 0.95)

    return sum(flat.owned for flat in optimizer.groups), step


def read(elements: int) -> Callable[[], object]:
    """Return a sum over a tensor: one read of as many elements."""
    return torch.randn(elements).sum


def alone(size: str, rounds: int, threads: int) -> dict[str, Any]:
    """Measure our step without and with clipping, the flat step, and a read of the gradients; medians in ms."""
    torch.set_num_threads(threads)
    elements, step = ours(SIZES[size])
    sides = {
        "flat": flat_adamw(elements),
        "read": read(elements),
        "ours": lambda: step(1e9),
        "ours, clipping": lambda: step(1e-3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARMUP + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    ms = {name: round(1000 * median(times), 2) for name, times in seconds.items()}
    ratios = {name: round(median(seconds[name]) / median(seconds["flat"]), 3) for name in sides}
    return {"elements": elements, "ms": ms, "of flat": ratios}


def ddp(rounds: int) -> dict[str, Any]:
    """Race two processes of one thread each against DDP; return tokens per second and peak memory."""
    sides = race(
        {
            "DDP": DDP(data_size=2),
            "ours": Setup(overrides=OVERLAPS, data_size=2),
            "ours, no overlap": Setup(data_size=2),
        },
        rounds,
    )
    metrics = {name: side.metrics() for name, side in sides.items()}
    for name in ("ours", "ours, no overlap"):
        metrics[name]["speed_ratio"] = round(sides[name].tokens_per_second / sides["DDP"].tokens_per_second, 3)
    return metrics


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["alone", "ddp"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    if args.what == "ddp":
        print(json.dumps(ddp(args.rounds), indent=1))
        return
    print(json.dumps({size: alone(size, args.rounds, args.threads) for size in args.sizes}, indent=1))


if __name__ == "__main__":
    main()
