"""Race against ``transformers``, turn by turn, and print JSON.

``python -m bench.peers [--yardstick bench-30M] [--rounds 10]``. Each side lives in a process of its own and rests while
the other runs a step, so that drifts of the machine hit both alike and each has its own peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from bench.yardsticks import YARDSTICKS

WARMUP = 3
SIDES = ("ours", "transformers")


def side(name: str, yardstick: str, threads: int, pipe: Connection) -> None:
    """Serve one side: a step for each message, its seconds as the reply; at the end the peak memory in bytes."""
    import torch

    torch.set_num_threads(threads)
    runner = _runner(name, yardstick)
    while pipe.recv():
        start = time.perf_counter()
        runner.step()
        pipe.send(time.perf_counter() - start)
    from internlm.profiler.reports import peak_rss_bytes

    pipe.send(peak_rss_bytes())


def _runner(name: str, yardstick: str) -> Any:
    if name == "ours":
        from bench.ours import Ours

        return Ours(YARDSTICKS[yardstick])
    from bench.transformers_peer import Transformers

    return Transformers(YARDSTICKS[yardstick])


def race(yardstick: str, rounds: int, threads: int) -> dict[str, Any]:
    """Race both sides; return speed and peak memory of each, and their ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in SIDES:
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(target=side, args=(name, yardstick, threads, far_end)))
        processes[-1].start()
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(WARMUP + rounds):
        for name in SIDES:
            pipes[name].send(True)
            took = pipes[name].recv()
            if turn >= WARMUP:
                seconds[name].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    peaks = {name: pipes[name].recv() for name in SIDES}
    for process in processes:
        process.join()
    tokens = YARDSTICKS[yardstick].tokens
    speed = {name: tokens / median(times) for name, times in seconds.items()}
    return {
        "yardstick": yardstick,
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "peak_rss_mb": {name: round(value / 2**20) for name, value in peaks.items()},
        "speed_ratio": round(speed["ours"] / speed["transformers"], 3),
        "speed_ratio_by_turn": [
            round(theirs / ours, 3) for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)
        ],
        "rss_ratio": round(peaks["ours"] / peaks["transformers"], 3),
    }


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yardstick", choices=YARDSTICKS, default="bench-30M")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps(race(args.yardstick, args.rounds, args.threads), indent=1))


if __name__ == "__main__":
    main()
