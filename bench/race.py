"""Sides that take turns, step by step: some processes of this framework each, or one of ``transformers``. All rest
while another runs, and each has its own peak of resident memory."""

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


@dataclass(frozen=True)
class Setup:
    """What one side runs: a yardstick of ``sequences`` a step, on ``world`` processes of one thread each, of which
    ``data_size`` read different ones; in so many micro-batches."""

    overrides: tuple[str, ...] = ()
    world: int = 2
    data_size: int = 1
    micro_num: int = 1
    sequences: int = 4
    yardstick: str = "bench-30M"

    @property
    def tokens(self) -> Yardstick:
        """The yardstick with its sequences."""
        return replace(YARDSTICKS[self.yardstick], micro_bsz=self.sequences)


@dataclass(frozen=True)
class Transformers(Setup):
    """One process of two threads."""

    world: int = 1


@dataclass(frozen=True)
class DDP(Setup):
    """``DistributedDataParallel``."""


@dataclass
class Ended:
    """What a rank knows at the end."""

    peak_rss: int
    sent: int = 0  # bytes a step
    records: list[Any] = field(default_factory=list)  # of the schedule, step by step
    peak_in_flight: int = 0


def _rank(setup: Setup, rank: int, port: int, pipe: Connection) -> None:
    """One process of one side: a step for each message, its seconds as the reply; at the end what it knows."""
    import torch

    from internlm.profiler.reports import peak_rss_bytes

    if isinstance(setup, Transformers):
        from bench.transformers_peer import Transformers as Peer

        torch.set_num_threads(2)
        peer = Peer(setup.tokens)
        _turns(pipe, peer.step)
        pipe.send(Ended(peak_rss_bytes()))
        return
    torch.set_num_threads(1)
    if isinstance(setup, DDP):
        from bench.ddp_peer import Ddp

        _turns(pipe, Ddp(setup.tokens, rank, setup.world, port).step)
        pipe.send(Ended(peak_rss_bytes()))
        return
    from bench.ours import Ours

    ours = Ours(setup.tokens, setup.overrides, rank, setup.world, port, setup.data_size, setup.micro_num)
    scheduler, steps, sent = ours.trainer.scheduler, [], []

    def step() -> None:
        scheduler.records = []
        ours.step()
        steps.append(scheduler.records)
        sent.append(ours.sent)

    _turns(pipe, step)
    per_step = (sent[-1] - sent[0]) // max(len(sent) - 1, 1)  # the first step may say more than the others
    pipe.send(Ended(peak_rss_bytes(), per_step, steps[WARMUP:], scheduler.peak_in_flight))


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
        self.ended: list[Ended] = []

    def step(self) -> None:
        """One step; its time is that of the slowest rank."""
        for pipe in self.pipes:
            pipe.send(True)
        self.seconds.append(max(pipe.recv() for pipe in self.pipes))

    def end(self) -> None:
        """Ask what the ranks know, and let them go."""
        for pipe in self.pipes:
            pipe.send(False)
        self.ended = [pipe.recv() for pipe in self.pipes]
        for process in self.processes:
            process.join()

    @property
    def step_seconds(self) -> float:
        """The median of its turns, those to warm up left out."""
        return median(self.seconds[WARMUP:])

    @property
    def tokens_per_second(self) -> float:
        """By that median."""
        return self.setup.tokens.tokens / self.step_seconds

    def figures(self) -> dict[str, Any]:
        """Speed, memory, traffic."""
        return {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "peak_rss_mb_per_rank": round(max(each.peak_rss for each in self.ended) / 2**20),
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
