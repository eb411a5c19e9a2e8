"""Subcommand ``internlm eval``: evaluate a checkpoint in this process, or on ranks that torchrun's API starts.

This file must not import torch, which takes seconds where this process only starts others.
"""

from __future__ import annotations

import argparse
import importlib

from internlm.cli.training import run_on_ranks
from internlm.utils.common import words_of


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a checkpoint, and return the exit code.

    Raises:
        UserError: An argument is wrong, or the rendezvous has failed; or as on a rank.
    """
    others = argparse.Namespace(**{**vars(arguments), "config": None})  # --config is an option of internlm train only
    words = ["eval", arguments.config, f"--ckpt={arguments.ckpt}", *words_of(others)]
    return run_on_ranks(_run_rank, arguments, [*words, *(["--json"] if arguments.json else [])])


def _run_rank(arguments: argparse.Namespace) -> None:
    importlib.import_module("internlm.cli.eval_rank").evaluate_rank(arguments)
