"""``internlm schedule``: what each rank of a pipeline does when, simulated and drawn."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm.cli.values import count, duration, file_to_write
from internlm.utils.errors import Problem, UserError

if TYPE_CHECKING:
    from internlm.core.scheduler.actions import Table

DESCRIPTION = (
    "Simulate a pipeline schedule and print what each rank does when: of a kind, or as it is written in a CSV file. "
    "Times are in one unit of your choice; those of F, B and W are of one chunk. "
    "Exit code: 0 it can run, 2 it cannot, or a mistake in the arguments."
)
WIDTH_OF_FILES = 120
MOST_PAIRS = 100_000


def add_parser(subparsers: Any) -> None:
    """Add ``schedule`` to the sub-commands of ``internlm``."""
    from internlm.core.scheduler.table import SCHEDULES

    parser = subparsers.add_parser("schedule", help="show or check a pipeline schedule", description=DESCRIPTION)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--kind", choices=SCHEDULES, help="a schedule that there is: %(choices)s", metavar="KIND")
    source.add_argument("--csv", type=Path, metavar="FILE", help="a schedule of your own: a line for each rank")
    add("--stages", type=count, required=True, metavar="P", help="ranks of the pipeline")
    add("--micro-batches", type=count, required=True, metavar="M", help="micro-batches of a step")
    add("--chunks", type=count, metavar="V", help="parts of the model on a rank (2 for interleaved and zbv, else 1)")
    add("--forward", type=duration, default=1.0, metavar="T", help="time of F (default: %(default)g)")
    add("--backward", type=duration, default=1.0, metavar="T", help="time of B, without W (default: %(default)g)")
    add("--weight", type=duration, default=1.0, metavar="T", help="time of W (default: %(default)g)")
    add("--transfer", type=duration, default=0.0, metavar="T", help="time from rank to rank (default: %(default)g)")
    add("--write-csv", type=file_to_write, metavar="FILE", help="write the schedule, to change it and give it as --csv")
    add("--svg", type=file_to_write, metavar="FILE", help="draw it")
    add("--html", type=file_to_write, metavar="FILE", help="draw it as a page; each action says what it is")
    add("--trace", type=file_to_write, metavar="FILE", help="write it for ui.perfetto.dev or chrome://tracing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Simulate, print and draw; raises :class:`UserError` for a schedule that cannot run."""
    from internlm import pictures
    from internlm.core.scheduler.table import write_table
    from internlm.core.scheduler.timeline import Costs
    from internlm.core.scheduler.validate import simulate

    a = arguments
    table = _table(a)
    if not (a.forward or a.backward or a.weight):
        raise UserError(Problem("--forward, --backward, --weight", "all are 0", "Give one of them a time"))
    costs = Costs.uniform(table.stage_layout.virtual_stages, a.forward, a.backward, a.weight, a.transfer)
    drawn = [("", simulate(table, costs))]
    if a.write_csv:
        write_table(table, a.write_csv)
    for path, draw in ((a.svg, pictures.svg), (a.html, pictures.html), (a.trace, pictures.chrome_trace)):
        if path:
            _write(path, draw(drawn))
    width = shutil.get_terminal_size((WIDTH_OF_FILES, 0)).columns
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(pictures.text(drawn, width, coloured), end="")


def _table(a: argparse.Namespace) -> Table:
    """The schedule that is asked for."""
    from internlm.core.scheduler.table import make_table, read_table

    pairs = a.stages * (a.chunks or 1) * a.micro_batches
    if pairs > MOST_PAIRS:
        what = f"{pairs} pairs of virtual stage and micro-batch are too many to draw"
        raise UserError(Problem("--stages, --chunks, --micro-batches", what, f"Keep to {MOST_PAIRS}"))
    if a.csv:
        return read_table(a.csv, a.stages, a.chunks or 1, a.micro_batches)
    usual = 2 if a.kind in ("interleaved", "zbv") else 1
    return make_table(a.kind, a.stages, a.chunks or usual, a.micro_batches)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(Problem(str(path), f"can't be written ({error.strerror})", "Give another path")) from None
