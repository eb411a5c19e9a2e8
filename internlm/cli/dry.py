"""Function that runs the subcommand ``dryrun``."""

from __future__ import annotations

import argparse

from internlm.cli.commands import EXIT_DIFFERENT, write_file
from internlm.config import Config, check_runnable
from internlm.core.context import ParallelMode
from internlm.core.context.layout import Layout
from internlm.core.context.parallel_context import sizes_of
from internlm.dryrun.findings import as_json, as_text, not_compared, problems
from internlm.dryrun.one_rank import dry_config, run_rank
from internlm.utils.errors import Problem, UserError


def dry_run(arguments: argparse.Namespace) -> int:
    """Run ranks on the pretended device, print the report, and return the exit code.

    Raises:
        UserError: The config or an option is invalid.
    """
    config = dry_config(arguments.config, arguments.set, arguments.world)
    check_runnable(config)
    ranks = _ranks(arguments, config)
    runs = []
    for rank in ranks:
        runs.append(run_rank(config, arguments.world, rank, arguments.steps, arguments.seed))
        print(as_text(runs[-1]), end="\n\n", flush=True)
    found = problems(runs)
    if arguments.json:
        write_file(arguments.json, as_json(runs))
    skipped = [line for run in runs for line in not_compared(run)]
    agreement = "Everything that was compared agrees" if skipped else "Everything agrees with its formula"
    print("\n".join([*skipped, *(found or [agreement])]))
    return EXIT_DIFFERENT if found else 0


def _ranks(arguments: argparse.Namespace, config: Config) -> list[int]:
    """Return the ranks to run.

    Raises:
        UserError: A rank is not in the world.
    """
    if arguments.stages:
        return Layout(sizes_of(config, arguments.world)).group_of(0, ParallelMode.PIPELINE)
    ranks: list[int] = arguments.rank or [0]
    for rank in ranks:
        if rank >= arguments.world:
            todo = f"Pass a rank below --world, {arguments.world}"
            raise UserError(Problem("--rank", f"{rank} is not a rank of the run", todo))
    return list(dict.fromkeys(ranks))
