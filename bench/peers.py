"""Race against ``transformers``, turn by turn, and print a table in Markdown and the ratios to reach.

``python -m bench.peers float32|bfloat16|data [--yardstick bench-30M] [--rounds 10]``. Each side lives in processes of
its own and rests while another runs a step, so that drifts of the machine hit all alike and each has its own peak of
resident memory. Ratios are those of the medians; those of single turns show how far they scatter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from bench.race import Setup, Side, Transformers, race
from bench.yardsticks import YARDSTICKS
from internlm.accelerator import processor

BF16 = ("model.dtype=torch.bfloat16",)
OURS, PEER, COMPILED = "ours", "transformers", "transformers + compile"
OURS_BF16, PEER_BF16, COMPILED_BF16 = "ours, bf16", "transformers, bf16", "transformers + compile, bf16"
OURS_DATA, PEER_DATA = "ours, data parallel 2", "transformers, DDP 2"

#: Sides by name. One process has two threads, two have one each.
SIDES = {
    OURS: Setup(world=1, threads=2),
    "ours + compile": Setup(world=1, threads=2, overrides=("model.compile=True",)),
    PEER: Transformers(),
    COMPILED: Transformers(compiled=True),
    OURS_BF16: Setup(world=1, threads=2, overrides=BF16),
    PEER_BF16: Transformers(dtype="bfloat16"),
    COMPILED_BF16: Transformers(dtype="bfloat16", compiled=True),
    OURS_DATA: Setup(data_size=2),
    PEER_DATA: Transformers(world=2, threads=1),
}


class Goal(NamedTuple):
    """A ratio to reach: of the speed of two sides, at least, and of their peak memory, at most."""

    ours: str
    theirs: str
    speed: float
    memory: float | None = None


#: Sides of each race.
RACES: dict[str, tuple[str, ...]] = {
    "float32": (OURS, PEER, COMPILED),
    "bfloat16": (OURS, OURS_BF16, PEER_BF16, COMPILED_BF16),
    "data": (OURS_DATA, PEER_DATA),
}
#: Goals by yardstick; those of sides that do not race are left out.
GOALS: dict[str, tuple[Goal, ...]] = {
    "bench-30M": (
        Goal(OURS, PEER, 1.10, 0.75),
        Goal(OURS, COMPILED, 1.10, 0.75),
        Goal(OURS_BF16, OURS, 2.5 if "amx_bf16" in processor.processor_type().split() else 1.5),
        Goal(OURS_DATA, PEER_DATA, 1.10),
    ),
    "bench-pack": (Goal(OURS, PEER, 1.5, 0.75),),
}


def table(sides: dict[str, Side]) -> Iterator[str]:
    """Format speed and memory of each side, as lines of Markdown."""
    yield "| side | tokens/s | ms a step | peak RSS a process, MB | of all processes |"
    yield "|---|--:|--:|--:|--:|"
    for name, side in sides.items():
        peak, total = (value / 2**20 for value in (side.peak_rss, sum(rank.peak_rss for rank in side.ended)))
        speed, step = side.tokens_per_second, side.step_seconds * 1e3
        yield f"| {name} | {speed:.0f} | {step:.0f} | {peak:.0f} | {total:.0f} |"


def ratios(sides: dict[str, Side], goals: tuple[Goal, ...]) -> Iterator[str]:
    """Format the ratios of the sides that raced, each with its goal, as lines of Markdown."""
    yield "| ratio | of | medians | by turn | to reach |"
    yield "|---|---|--:|--:|--:|"
    for goal in goals:
        if goal.ours not in sides or goal.theirs not in sides:
            continue
        ours, theirs = sides[goal.ours], sides[goal.theirs]
        pair, turns = f"{goal.ours} / {goal.theirs}", ours.ratio_by_turn(theirs)
        speed = ours.tokens_per_second / theirs.tokens_per_second
        by_turn = f"{min(turns):.2f}–{max(turns):.2f}, median {median(turns):.2f}"
        yield f"| {pair} | tokens/s | {speed:.2f} | {by_turn} | ≥ {goal.speed:.2f} |"
        if goal.memory is not None:
            yield f"| {pair} | peak RSS | {ours.peak_rss / theirs.peak_rss:.2f} | | ≤ {goal.memory:.2f} |"


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", choices=RACES, nargs="?", default="float32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="race these instead")
    parser.add_argument("--yardstick", choices=YARDSTICKS, default="bench-30M")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    names = args.sides or RACES[args.race]
    sides = race({name: replace(SIDES[name], yardstick=args.yardstick) for name in names}, args.rounds)
    print(f"{processor.processor_name()} ({processor.processor_type()}), {args.yardstick}, {args.rounds} rounds\n")
    print("\n".join([*table(sides), "", *ratios(sides, GOALS[args.yardstick])]))


if __name__ == "__main__":
    main()
