"""``internlm verify``: whether a config gives on several processes what it gives on one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from internlm.cli.values import file_to_write

DESCRIPTION = (
    "Train some steps on several processes of this machine (CPU), and the same model on one, from one seed and one "
    "global batch; compare loss, gradients, parameters, the outputs of modules, and what was sent. Nothing is saved. "
    "Exit code: 0 they agree, 1 they don't or a process failed, 2 a mistake in config or arguments."
)
EXIT_FAIL = 1


def add_parser(subparsers: Any) -> None:
    """Add ``verify`` to the sub-commands of ``internlm``."""
    parser = subparsers.add_parser(
        "verify", help="compare a config on several processes with one process", description=DESCRIPTION
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="Python config file; it is executed")
    add(
        "--world",
        type=_count,
        metavar="N",
        help="processes (default: the fewest that the parallel sizes allow, times 2)",
    )
    add("--steps", type=_count, default=3, metavar="K", help="steps to train (default: %(default)s)")
    add(
        "--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float64", help="default: %(default)s"
    )
    add("--seed", type=_number, default=1024, help="seed of parameters and data (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    add("--debug-size", action="store_true", help="make model and data tiny, the architecture kept; data are random")
    add("--timeout", type=_count, default=600, metavar="S", help="seconds for either run (default: %(default)s)")
    add("--json", type=file_to_write, metavar="FILE", help="write all numbers to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the report; the exit code. Raises :class:`UserError` for what the user can mend."""
    from internlm.verify.compare import compare
    from internlm.verify.configs import make_plan
    from internlm.verify.processes import RankError, run_world
    from internlm.verify.report import as_json, as_text, heading
    from internlm.verify.run import run_rank

    a = arguments
    plan = make_plan(a.config, a.set, a.world, steps=a.steps, dtype=a.dtype, seed=a.seed, shrink=a.debug_size)
    print(heading(plan), flush=True)
    try:
        (alone,) = run_world(1, run_rank, (plan.reference, plan.seed, plan.steps, plan.data_size), a.timeout)
        ranks = run_world(plan.world_size, run_rank, (plan.config, plan.seed, plan.steps), a.timeout)
    except RankError as error:
        print(error, file=sys.stderr)
        return EXIT_FAIL
    report = compare(plan.config, alone, ranks)
    print(as_text(report))
    if a.json:
        a.json.write_text(as_json(plan, report))
    return 0 if report.passed else EXIT_FAIL


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _count(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return int(text)
