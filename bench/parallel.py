"""bench-30M on two processes of one thread in each parallel mode, against one process of ``transformers`` with two.

``python -m bench.parallel [--rounds 8] [--modes data mtp msp fsp isp]`` prints JSON. All sides take turns.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bench.race import Setup, Transformers, race

ISP = ("parallel.weight.size=2", "parallel.weight.overlap=True", "parallel.weight.memory_pool=True")
MODES = {
    "data": Setup(data_size=2),
    **{
        mode: Setup(
            overrides=("parallel.tensor.size=2", f"parallel.tensor.mode={mode}", *(ISP if mode == "isp" else ()))
        )
        for mode in ("mtp", "msp", "fsp", "isp")
    },
}
YARD = "transformers"


def measure(modes: list[str], rounds: int) -> dict[str, Any]:
    """Race the modes; return the metrics of each side and its speed relative to ``transformers``."""
    sides = race({YARD: Transformers(), **{mode: MODES[mode] for mode in modes}}, rounds)
    metrics = {name: side.metrics() for name, side in sides.items()}
    for mode in modes:
        metrics[mode]["speed_ratio"] = round(sides[mode].tokens_per_second / sides[YARD].tokens_per_second, 3)
    return metrics


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    print(json.dumps(measure(args.modes, args.rounds), indent=1))


if __name__ == "__main__":
    main()
