"""Subcommand ``internlm config``: print a resolved config without importing torch."""

from __future__ import annotations

import argparse
import json
import sys

from internlm.config import check_registered, check_runnable, resolve, with_sources


def show_config(arguments: argparse.Namespace) -> None:
    """Print the resolved config as JSON, each value with its source; warnings go to stderr.

    Raises:
        ConfigError: The config is invalid, needs a feature that does not exist, or its model type is not registered.
    """
    resolved = resolve(arguments.config, arguments.set, arguments.world, arguments.device)
    check_runnable(resolved.config)
    check_registered(resolved.config)
    print(json.dumps(with_sources(resolved.config, resolved.sources), indent=2))
    for warning in resolved.warnings:
        print(f"warning: {warning}", file=sys.stderr)
