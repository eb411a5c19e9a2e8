"""bench-30M on two processes of one thread in each parallel mode, against one process of ``transformers`` with two.

``python -m bench.parallel [--rounds 8] [--modes data mtp msp fsp isp]`` prints JSON. All sides take turns, step by
step, and rest while another runs; each has its own peak of resident memory.
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
YARDSTICK = "bench-30M"
#: Overrides of each mode, and how many ranks read different sequences.
MODES: dict[str, tuple[tuple[str, ...], int]] = {
    "data": ((), 2),
    **{mode: (("parallel.tensor.size=2", f"parallel.tensor.mode={mode}"), 1) for mode in ("mtp", "msp", "fsp")},
    "isp": (
        ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.weight.overlap=True",
         "parallel.weight.memory_pool=True"),
        1,
    ),
}  # fmt: skip
YARD = "transformers"


def rank_of(mode: str, rank: int, port: int, pipe: Connection) -> None:
    """One process of one side: a step for each message, its seconds as the reply; at the end the peak memory, and the
    bytes that a step sends."""
    import torch

    torch.set_num_threads(2 if mode == YARD else 1)
    runner = _runner(mode, rank, port)
    steps, sent = 0, 0
    while pipe.recv():
        if steps == 1:  # the first step may say more than the others
            sent = getattr(runner, "sent", 0)
        start = time.perf_counter()
        runner.step()
        pipe.send(time.perf_counter() - start)
        steps += 1
    from internlm.profiler.memory import peak_rss_bytes

    pipe.send((peak_rss_bytes(), (getattr(runner, "sent", 0) - sent) // max(steps - 1, 1)))


def _runner(mode: str, rank: int, port: int) -> Any:
    yardstick = YARDSTICKS[YARDSTICK]
    if mode == YARD:
        from bench.transformers_peer import Transformers

        return Transformers(yardstick)
    from bench.ours import Ours

    overrides, data_size = MODES[mode]
    return Ours(yardstick, overrides, rank, 2, port, data_size)


class Side:
    """The processes of one mode."""

    def __init__(self, mode: str) -> None:
        from bench.ours import free_port

        context, port = multiprocessing.get_context("spawn"), free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(1 if mode == YARD else 2):
            pipe, far_end = context.Pipe()
            self.pipes.append(pipe)
            self.processes.append(context.Process(target=rank_of, args=(mode, rank, port, far_end)))
            self.processes[-1].start()
        self.seconds: list[float] = []

    def step(self) -> None:
        """One step; its time is that of the slowest rank."""
        for pipe in self.pipes:
            pipe.send(True)
        self.seconds.append(max(pipe.recv() for pipe in self.pipes))

    def end(self) -> dict[str, Any]:
        """Its figures."""
        for pipe in self.pipes:
            pipe.send(False)
        last = [pipe.recv() for pipe in self.pipes]
        for process in self.processes:
            process.join()
        return {
            "tokens_per_second": round(YARDSTICKS[YARDSTICK].tokens / median(self.seconds[WARMUP:]), 1),
            "peak_rss_mb_per_rank": round(max(peak for peak, _ in last) / 2**20),
            "sent_mb_per_step": round(last[0][1] / 2**20, 2),
        }


def race(modes: list[str], rounds: int) -> dict[str, Any]:
    """Figures of each side, and how fast it is beside the yardstick, by the medians of its turns."""
    sides = {mode: Side(mode) for mode in (YARD, *modes)}
    for _ in range(WARMUP + rounds):
        for side in sides.values():
            side.step()
    figures = {mode: side.end() for mode, side in sides.items()}
    for mode in modes:
        figures[mode]["speed_ratio"] = round(
            median(sides[YARD].seconds[WARMUP:]) / median(sides[mode].seconds[WARMUP:]), 3
        )
    return figures


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    print(json.dumps(race(args.modes, args.rounds), indent=1))


if __name__ == "__main__":
    main()
