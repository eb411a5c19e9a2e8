"""Subcommand ``internlm data replay``: run the micro-batches of a step again, on ranks as ``internlm train`` does.

This file must not import torch, which takes seconds where this process only starts others.
"""

from __future__ import annotations

import argparse
import importlib

from internlm.cli.training import run_on_ranks
from internlm.utils.common import words_of


def replay(arguments: argparse.Namespace) -> int:
    """Run the micro-batches of a step again, and return the exit code.

    Raises:
        UserError: An argument is wrong, or the rendezvous has failed; or as on a rank.
    """
    others = argparse.Namespace(**{**vars(arguments), "config": None})  # --config is an option of internlm train only
    words = ["data", "replay", arguments.config, f"--step={arguments.step}", *words_of(others)]
    words += [f"--ckpt={arguments.ckpt}"] if arguments.ckpt else []
    return run_on_ranks(_run_rank, arguments, [*words, *(["--json"] if arguments.json else [])])


def _run_rank(arguments: argparse.Namespace) -> None:
    importlib.import_module("internlm.cli.replay_rank").replay_rank(arguments)
