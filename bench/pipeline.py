"""bench-30M on a pipeline of two stages, a process of one thread each. Prints JSON; sides of a race take turns.

``python -m bench.pipeline peers [--rounds 8]``
    4 micro-batches, against data parallelism on two processes and one process of ``transformers`` with two threads.

``python -m bench.pipeline simulated [--rounds 8]``
    8 micro-batches: the time of the schedule, beside what the simulation makes of the times of its actions.

``python -m bench.pipeline overhead``
    Python's time around an action: a tiny model in four chunks on one process, where nothing is sent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.race import Setup, Side, Transformers, race
from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.table import make_table
from internlm.core.scheduler.timeline import Costs, Record, measured_costs, measured_timeline, overheads
from internlm.core.scheduler.validate import simulate

STAGES = 2
#: Overrides and chunks.
SCHEDULES: dict[str, tuple[tuple[str, ...], int]] = {
    "1f1b": (("parallel.pipeline.mode=1F1B", "parallel.pipeline.partition=flops"), 1),
    "zbh1": (("parallel.pipeline.mode=ZBH1", "parallel.pipeline.partition=flops"), 1),
    "interleaved": (("model.num_chunks=2", "parallel.pipeline.interleaved_overlap=True"), 2),
    "zbv": (("parallel.pipeline.mode=ZBV",), 2),
}


def setup_of(schedule: str, micro_num: int) -> Setup:
    """Set a schedule up with micro-batches of one sequence of 512 tokens."""
    return Setup(
        overrides=(f"parallel.pipeline.size={STAGES}", *SCHEDULES[schedule][0]),
        micro_num=micro_num,
        sequences=micro_num,
    )


def peers(rounds: int) -> dict[str, Any]:
    """Race the schedules against data parallelism and ``transformers``."""
    setups = {"transformers": Transformers(), "data": Setup(data_size=2)}
    sides = race({**setups, **{schedule: setup_of(schedule, 4) for schedule in SCHEDULES}}, rounds)
    yard = sides["transformers"].tokens_per_second
    return {
        name: {**side.metrics(), "speed_ratio": round(side.tokens_per_second / yard, 3)} for name, side in sides.items()
    }


def simulated(rounds: int) -> dict[str, Any]:
    """Compare measured and simulated times and peaks in flight of the schedules, and race data parallelism."""
    data = Setup(data_size=2, micro_num=4, sequences=8)
    sides = race({"data": data, **{schedule: setup_of(schedule, 8) for schedule in SCHEDULES}}, rounds)
    yard = sides["data"].tokens_per_second
    metrics: dict[str, Any] = {"data": sides["data"].metrics()}
    for schedule in SCHEDULES:
        metrics[schedule] = {
            **sides[schedule].metrics(),
            "beside_data": round(sides[schedule].tokens_per_second / yard, 3),
            **beside_simulation(schedule, sides[schedule]),
        }
    first, second = metrics["1f1b"], metrics["zbh1"]
    metrics["zbh1 over 1f1b"] = {
        key: round(first[f"{key}_ms"] / second[f"{key}_ms"], 3) for key in ("measured", "simulated")
    }
    return metrics


def beside_simulation(schedule: str, side: Side) -> dict[str, Any]:
    """Compare the recorded steps of a side with a simulation from the median costs of its actions."""
    table = make_table(schedule, STAGES, SCHEDULES[schedule][1], side.setup.micro_num)
    steps: list[tuple[list[Record], ...]] = list(zip(*(rank.records for rank in side.ended), strict=True))
    costs = _medians([measured_costs(table, step) for step in steps])
    timeline = simulate(table, costs)
    measured = median(measured_timeline(table, step).end for step in steps)
    return {
        "measured_ms": round(measured * 1e3, 1),
        "simulated_ms": round(timeline.end * 1e3, 1),
        "simulated_over_measured": round(timeline.end / measured, 3),
        "simulated_idle": round(timeline.bubble, 3),
        "transfer_ms": round(costs.transfer * 1e3, 2),
        "forward_ms": [round(seconds * 1e3, 1) for seconds in costs.forward],
        "backward_ms": [round(seconds * 1e3, 1) for seconds in costs.backward],
        "weight_ms": [round(seconds * 1e3, 1) for seconds in costs.weight],
        "overhead_us": round(_overhead(table, steps) * 1e6, 1),
        "peak_in_flight": [rank.peak_in_flight for rank in side.ended],
        "simulated_peak": list(timeline.peak_in_flight),
    }


def _medians(all_costs: list[Costs]) -> Costs:
    def of(name: str) -> tuple[float, ...]:
        return tuple(median(values) for values in zip(*(getattr(costs, name) for costs in all_costs), strict=True))

    return Costs(of("forward"), of("backward"), of("weight"), median(costs.transfer for costs in all_costs))


def _overhead(table: Table, steps: Sequence[tuple[list[Record], ...]]) -> float:
    """Return the median overhead of an action in seconds; the mean would be that of rare interruptions."""
    ranks = range(table.stage_layout.stages)
    return median(seconds for step in steps for rank in ranks for seconds in overheads(table, rank, step[rank]))


def python_alone(rounds: int) -> dict[str, Any]:
    """Measure the executor on one process, where nothing is sent, so that all time outside of actions is overhead."""
    tiny = (
        "model.hidden_size=64",
        "model.num_attention_heads=1",
        "model.num_kv_attention_heads=1",
        "model.num_chunks=4",
    )
    setup = Setup(overrides=tiny, world=1, micro_num=8, sequences=8)
    side = race({"alone": setup}, rounds)["alone"]
    table = make_table("interleaved", 1, 4, 8)
    steps = [(step,) for step in side.ended[0].records]
    return {"actions": len(table.actions[0]), "overhead_us": round(_overhead(table, steps) * 1e6, 1)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["peers", "simulated", "overhead"])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    run = {"peers": peers, "simulated": simulated, "overhead": python_alone}[args.what]
    print(json.dumps(run(args.rounds), indent=1))


if __name__ == "__main__":
    main()
