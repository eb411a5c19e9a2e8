"""Functions that run the subcommands ``memory``, ``schedule`` and ``verify``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from internlm import accelerator, pictures
from internlm.config import Config, check_runnable, load_config
from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.table import make_table, read_table, schedule_of, write_table
from internlm.core.scheduler.timeline import Costs
from internlm.core.scheduler.validate import simulate
from internlm.costs import format_plans
from internlm.costs.activations import peak_on_host
from internlm.costs.memory_plan import ACTIVATIONS, format_bytes
from internlm.train.inventory import plans_of_stages
from internlm.utils.errors import ConfigError, Problem, UserError
from internlm.verify import locate
from internlm.verify.compare import Report
from internlm.verify.configs import Devices
from internlm.verify.processes import RankError
from internlm.verify.report import as_json, as_text, heading
from internlm.verify.session import Session
from internlm.verify.shrink import Attempt

#: Width, in columns, of a timeline that is not printed on a terminal.
WIDTH_OF_FILES = 120
#: Maximum number of pairs of virtual stage and micro-batch in a drawn schedule.
MOST_PAIRS = 100_000
#: Maximum number of such pairs in a memory plan, whose time is proportional to it.
MOST_PLANNED_PAIRS = 1_000_000
EXIT_DIFFERENT = 1


# -- memory -----------------------------------------------------------------------------------------------------------
def estimate_memory(arguments: argparse.Namespace) -> None:
    """Print the memory plan of each pipeline stage.

    Raises:
        UserError: The config is invalid or unsupported, its pipeline has too many actions for a plan, or its model
            cannot be built to count its parameters.
    """
    config = load_config(arguments.config, arguments.set, arguments.world, arguments.device)
    check_runnable(config)
    _check_pairs(config)
    plans = plans_of_stages(config, arguments.world, arguments.device)
    # The job may run on another machine. If this machine has devices of the same type, assume their memory.
    device_memory = accelerator.device_memory() if accelerator.device_type() == arguments.device else None
    print(f"Memory plan of the rank with the most memory in each stage, of {arguments.world} ranks")
    print(format_plans(plans, [f"stage {stage}" for stage in range(len(plans))], device_memory))
    if config.model.cpu_offloading and ACTIVATIONS in plans[0]:
        offloaded = [
            peak_on_host(config, arguments.world, stage=stage, device_type=arguments.device)
            for stage in range(len(plans))
        ]
        print(f"In host memory, by offloading: {', '.join(map(format_bytes, offloaded))}")


def _check_pairs(config: Config) -> None:
    """Raise if the plans of all stages would take minutes."""
    pairs = config.parallel.pipeline.size * config.model.num_chunks * config.data.micro_num
    if pairs > MOST_PLANNED_PAIRS:
        message = f"{pairs} pairs of virtual stage and micro-batch exceed the maximum of {MOST_PLANNED_PAIRS} of a plan"
        where = "parallel.pipeline.size, model.num_chunks, data.micro_num"
        raise UserError(Problem(where, message, "Lower one of them with --set"))


# -- schedule ---------------------------------------------------------------------------------------------------------
def draw_schedule(arguments: argparse.Namespace) -> None:
    """Simulate and print a pipeline schedule, and write the requested files.

    Raises:
        UserError: The config or schedule is invalid, an option is missing, or a file cannot be written.
    """
    a = arguments
    table = _table(a)
    if not (a.forward or a.backward or a.weight):
        raise UserError(Problem("--forward, --backward, --weight", "all are 0", "Pass at least one value above 0"))
    costs = Costs.uniform(table.stage_layout.virtual_stages, a.forward, a.backward, a.weight, a.transfer)
    timelines = [("", simulate(table, costs))]
    if a.write_csv:
        write_table(table, a.write_csv)
    # Files first: output that is cut off by ``| head`` must not leave them unwritten.
    for path, draw in ((a.svg, pictures.svg), (a.html, pictures.html), (a.trace, pictures.chrome_trace)):
        if path:
            write_file(path, draw(timelines))
    width = shutil.get_terminal_size((WIDTH_OF_FILES, 0)).columns
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(pictures.text(timelines, width, coloured), end="")


def _table(a: argparse.Namespace) -> Table:
    """Build the action table of the schedule from the config and the options; options take precedence."""
    schedule, csv, stages, chunks, micro_batches = a.kind, a.csv, a.stages, a.chunks, a.micro_batches
    if a.config:
        config = load_config(a.config, a.set, a.world, a.device)
        pipeline = config.parallel.pipeline
        chunks = chunks or (None if schedule else config.model.num_chunks)
        stages, micro_batches = stages or pipeline.size, micro_batches or config.data.micro_num
        if not schedule and not csv:
            schedule = schedule_of(pipeline.mode, config.model.num_chunks)
            csv = Path(pipeline.table) if pipeline.table else None
    elif a.set or a.world:
        raise ConfigError(Problem("internlm schedule", "--set and --world need a config", "Pass a config file"))
    if not (schedule or csv) or not stages or not micro_batches:
        todo = "Pass a config file, or --kind (or --csv), --stages and --micro-batches"
        message = "the schedule, number of stages or number of micro-batches is missing"
        raise ConfigError(Problem("internlm schedule", message, todo))
    pairs = stages * (chunks or 1) * micro_batches
    if pairs > MOST_PAIRS:
        message = f"{pairs} pairs of virtual stage and micro-batch exceed the maximum of {MOST_PAIRS}"
        raise UserError(Problem("--stages, --chunks, --micro-batches", message, "Lower one of them"))
    if csv:
        return read_table(csv, stages, chunks or 1, micro_batches)
    return make_table(schedule, stages, chunks or (2 if schedule in ("interleaved", "zbv") else 1), micro_batches)


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to a file that the user has named.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be written ({error.strerror})", "Pass a writable path")) from None


# -- verify -----------------------------------------------------------------------------------------------------------
def verify(arguments: argparse.Namespace) -> int:
    """Compare a run on several processes with a run on one, print the report, and return the exit code.

    Raises:
        UserError: The config or an option is invalid, or this machine has too few devices.
    """
    a = arguments
    devices = Devices.of_this_machine(a.device)
    attempt = Attempt(
        source=a.config,
        overrides=tuple(a.set),
        world_size=a.world,
        steps=a.steps,
        dtype=a.dtype,
        shrink=a.debug_size,
        devices=devices,
        seed=a.seed,
    )
    plan = attempt.plan()
    attempt = replace(attempt, world_size=plan.world_size)
    print(heading(plan), flush=True)
    with Session(a.config, a.timeout, a.device) as session:
        try:
            report = session.compare(plan)
        except RankError as error:
            print(error, file=sys.stderr)
            return EXIT_DIFFERENT
        print(as_text(report), flush=True)
        location = None if report.passed or a.no_locate else _locate(session, attempt, report)
    if a.json:
        write_file(a.json, as_json(plan, report, None if location is None else locate.as_dict(location)))
    return 0 if report.passed else EXIT_DIFFERENT


def _locate(session: Session, attempt: Attempt, report: Report) -> locate.Location | None:
    """Print where a layout differs; None if the run that records the tensors failed."""
    print("searching for the smallest layout that differs ...", file=sys.stderr, flush=True)
    try:
        location = locate.locate(session, attempt, report)
    except (RankError, UserError) as error:
        # The comparison itself is done: its report and exit code do not depend on the search.
        print(f"no culprit, since the run that records all tensors failed: {error}", file=sys.stderr)
        return None
    print(locate.as_text(location))
    return location
