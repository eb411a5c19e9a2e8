"""``internlm memory``: what the ranks of a run will hold, before it is started."""

from __future__ import annotations

import argparse
from typing import Any

from internlm.cli.values import count
from internlm.utils.errors import Problem, UserError

DESCRIPTION = (
    "Print how much memory each part of a run takes, by formula, on the rank of each pipeline stage that holds the "
    "most. Nothing is started. Exit code: 0, or 2 for a mistake in config or arguments."
)


def add_parser(subparsers: Any) -> None:
    """Add ``memory`` to the sub-commands of ``internlm``."""
    parser = subparsers.add_parser("memory", help="tell what the ranks of a run will hold", description=DESCRIPTION)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="Python config file; it is executed")
    add("--world", type=count, required=True, metavar="N", help="processes")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="where they will run (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; raises :class:`UserError` for what the user can mend."""
    from internlm.config import check_runnable, load_config
    from internlm.costs import format_plans, plans_of_stages
    from internlm.model.families import FAMILIES
    from internlm.utils.errors import did_you_mean

    config = load_config(arguments.config, arguments.set, arguments.world, arguments.device)
    check_runnable(config)
    try:
        plans = plans_of_stages(config, arguments.world)
    except KeyError:
        what = f"there is no formula for the memory of {config.model_type!r}"
        near = did_you_mean(config.model_type, FAMILIES)
        todo = f"{near} Of a model of your own, measure it: train.py --profiling"
        raise UserError(Problem("model_type", what, todo)) from None
    print(f"Memory plan of the rank of each stage that holds the most, of {arguments.world}, in MB")
    print(format_plans(plans, [f"stage {stage}" for stage in range(len(plans))]))
