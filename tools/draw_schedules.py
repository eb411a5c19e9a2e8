"""Pictures of the pipeline schedules: each simulated on four stages, where F, B and W take the same time."""

from __future__ import annotations

import argparse
from pathlib import Path

from internlm.core.scheduler.table import SCHEDULES, make_table
from internlm.core.scheduler.timeline import Costs
from internlm.core.scheduler.validate import simulate
from internlm.pictures import svg

STAGES, MICRO_BATCHES = 4, 8
CHUNKS = {"interleaved": 2, "zbv": 2}


def picture(schedule: str) -> str:
    """Draw ``schedule`` as SVG."""
    table = make_table(schedule, STAGES, CHUNKS.get(schedule, 1), MICRO_BATCHES)
    return svg([("", simulate(table, Costs.uniform(table.stage_layout.virtual_stages)))])


def main() -> None:
    """Write a picture of each schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for schedule in SCHEDULES:
        (folder / f"{schedule}.svg").write_text(picture(schedule), encoding="utf-8")


if __name__ == "__main__":
    main()
