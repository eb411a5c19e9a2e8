"""Subcommand ``internlm config``: print a resolved config without importing torch."""

from __future__ import annotations

import argparse
import json
import sys

from internlm.config import Config, check_runnable, resolve, with_sources
from internlm.utils.errors import ConfigError


def show_config(arguments: argparse.Namespace) -> None:
    """Print the resolved config as JSON, each value with its source; warnings go to stderr.

    Raises:
        ConfigError: The config is invalid; every problem is listed.
    """
    resolved = resolve(arguments.config, arguments.set, arguments.world, arguments.device)
    print(json.dumps(with_sources(resolved.config, resolved.sources), indent=2))
    for warning in [*resolved.warnings, *_obstacles(resolved.config)]:
        print(f"warning: {warning}", file=sys.stderr)


def _obstacles(config: Config) -> list[str]:
    """Return one message for each setting of ``config`` that this version does not support."""
    try:
        check_runnable(config)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []
