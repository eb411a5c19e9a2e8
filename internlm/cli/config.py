"""``internlm config``: show what a config file resolves to, and where each value came from."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from internlm.cli.values import count
from internlm.config import Config, check_runnable, resolve, with_sources
from internlm.utils.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add ``config`` to the sub-commands of ``internlm``."""
    parser = subparsers.add_parser(
        "config",
        help="show a resolved config as JSON",
        description="Resolve and check a config file, and print each value with its source: "
        "file, override, derived (from other values) or default. Warnings go to stderr.",
    )
    parser.add_argument("config", metavar="CONFIG", help="Python config file; it is executed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--world-size", type=count, metavar="N", help="check the parallel sizes for N processes")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="check and derive what depends on the device")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the resolved config; raises :class:`ConfigError` with everything that is wrong."""
    resolved = resolve(arguments.config, arguments.set, arguments.world_size, arguments.device)
    print(json.dumps(with_sources(resolved.config, resolved.sources), indent=2))
    for warning in [*resolved.warnings, *_why_not_runnable(resolved.config)]:
        print(f"warning: {warning}", file=sys.stderr)


def _why_not_runnable(config: Config) -> list[str]:
    try:
        check_runnable(config)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []
