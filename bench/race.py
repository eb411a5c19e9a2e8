"""Race several setups against each other, step by step in turns.

Each side has processes of its own, and so a peak of resident memory of its own. All sides rest while another runs, so
that drifts of the machine hit all of them alike.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from bench.yardsticks import YARDSTICKS, Yardstick

WARMUP = 3


@dataclass
class RankResult:
    """Measurements that a rank sends after its last step."""

    peak_rss: int
    sent: int = 0  # bytes a step
    records: list[Any] = field(default_factory=list)  # of the schedule, step by step
    peak_in_flight: int = 0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One side of a race, run by this framework."""

    overrides: tuple[str, ...] = ()
    world: int = 2  # processes
    threads: int = 1  # of a process
    data_size: int = 1  # ranks that read different sequences
    micro_num: int = 1
    sequences: int | None = None  # of a step; None: as many as the yardstick has
    yardstick: str = "bench-30M"

    @property
    def tokens(self) -> Yardstick:
        """The yardstick with the sequences of this side."""
        yardstick = YARDSTICKS[self.yardstick]
        return replace(yardstick, micro_bsz=self.sequences or yardstick.micro_bsz)

    # Imports are in the methods, because each process needs those of its side only, and they count in its memory.
    def run(self, rank: int, port: int, pipe: Connection) -> RankResult:
        """Take turns on one rank, then return its measurements."""
        from bench.ours import Ours

        ours = Ours(self.tokens, self.overrides, rank, self.world, port, self.data_size, self.micro_num)
        scheduler, steps, sent = ours.trainer.scheduler, [], []

        def step() -> None:
            scheduler.records = []
            ours.step()
            steps.append(scheduler.records)
            sent.append(ours.sent)

        _turns(pipe, step)
        per_step = (sent[-1] - sent[0]) // max(len(sent) - 1, 1)  # the first step may send more than the others
        return RankResult(peak_rss(), per_step, steps[WARMUP:], scheduler.peak_in_flight)


@dataclass(frozen=True, kw_only=True)
class Transformers(Setup):
    """One side, run by ``transformers``: one process of two threads, or two under ``DistributedDataParallel``."""

    world: int = 1
    threads: int = 2
    dtype: str = "float32"
    compiled: bool = False

    def run(self, rank: int, port: int, pipe: Connection) -> RankResult:
        """Take turns on one rank, then return its measurements."""
        from bench import transformers_peer as peer

        if self.world > 1:
            peer.join(rank, self.world, port)
        _turns(pipe, peer.Transformers(self.tokens, self.dtype, self.compiled).step)
        return RankResult(peak_rss())


@dataclass(frozen=True, kw_only=True)
class DDP(Setup):
    """One side: our model under torch's ``DistributedDataParallel``."""

    def run(self, rank: int, port: int, pipe: Connection) -> RankResult:
        """Take turns on one rank, then return its measurements."""
        from bench.ddp_peer import Ddp

        _turns(pipe, Ddp(self.tokens, rank, self.world, port).step)
        return RankResult(peak_rss())


def peak_rss() -> int:
    """Return the peak of this process's resident memory in bytes."""
    from internlm.profiler.reports import peak_rss_bytes

    return peak_rss_bytes()


def _rank(setup: Setup, rank: int, port: int, pipe: Connection) -> None:
    """Run one process of one side: a step for each message, its seconds as the reply; at the end the measurements."""
    import torch

    torch.set_num_threads(setup.threads)
    pipe.send(setup.run(rank, port, pipe))


def _turns(pipe: Connection, step: Any) -> None:
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


class Side:
    """The processes of one side."""

    def __init__(self, setup: Setup) -> None:
        from bench.ours import free_port

        context, port = multiprocessing.get_context("spawn"), free_port()
        self.setup = setup
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(setup.world):
            pipe, far_end = context.Pipe()
            self.pipes.append(pipe)
            self.processes.append(context.Process(target=_rank, args=(setup, rank, port, far_end)))
            self.processes[-1].start()
        self.seconds: list[float] = []
        self.ended: list[RankResult] = []

    def step(self) -> None:
        """Run one step; its time is that of the slowest rank."""
        for pipe in self.pipes:
            pipe.send(True)
        self.seconds.append(max(pipe.recv() for pipe in self.pipes))

    def end(self) -> None:
        """Collect the measurements of the ranks and end their processes."""
        for pipe in self.pipes:
            pipe.send(False)
        self.ended = [pipe.recv() for pipe in self.pipes]
        for process in self.processes:
            process.join()

    @property
    def step_seconds(self) -> float:
        """Median time of a step, without the warm-up."""
        return median(self.seconds[WARMUP:])

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, by the median time of a step."""
        return self.setup.tokens.tokens / self.step_seconds

    def ratio_by_turn(self, other: Side) -> list[float]:
        """Return how many times as long ``other`` took as this side, turn by turn."""
        return [theirs / ours for ours, theirs in zip(self.seconds[WARMUP:], other.seconds[WARMUP:], strict=True)]

    @property
    def peak_rss(self) -> int:
        """Largest peak of resident memory of a rank, in bytes."""
        return max(result.peak_rss for result in self.ended)

    def metrics(self) -> dict[str, Any]:
        """Return speed, memory and traffic."""
        return {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "peak_rss_mb_per_rank": round(self.peak_rss / 2**20),
            "sent_mb_per_step": round(self.ended[0].sent / 2**20, 2),
        }


def race(setups: Mapping[str, Setup], rounds: int) -> dict[str, Side]:
    """Let the sides take turns, ``rounds`` times after warming up."""
    sides = {name: Side(setup) for name, setup in setups.items()}
    for _ in range(WARMUP + rounds):
        for side in sides.values():
            side.step()
    for side in sides.values():
        side.end()
    return sides
