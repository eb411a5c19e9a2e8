"""Subcommand ``internlm generate``: continue texts in this process, or on ranks that torchrun's API starts.

This file must not import torch, which takes seconds where this process only starts others.
"""

from __future__ import annotations

import argparse
import importlib

from internlm.cli.launch_options import LauncherOption, add_launcher_options
from internlm.cli.parsers import count, natural
from internlm.cli.training import run_on_ranks
from internlm.utils.common import add_overrides, add_process_arguments, words_of


def number(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def probability(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


#: Options with one value: flag, placeholder, help, parser and default.
_OPTIONS = (
    (LauncherOption("--prompt-file", "FILE", "text file with a prompt on each line"), None),
    (
        LauncherOption("--tokenizer", "PATH", "tokenizer (default: data.tokenizer_path, or that of --ckpt)"),
        None,
    ),
    (LauncherOption("--max-new-tokens", "N", "most tokens to generate for a prompt (default: 128)", natural), 128),
    (
        LauncherOption("--temperature", "T", "divisor of the logits; 0: the most probable (default: 1)", number),
        1.0,
    ),
    (LauncherOption("--top-k", "K", "sample from the K most probable tokens (default: from all)", count), None),
    (
        LauncherOption("--top-p", "P", "sample from the likeliest tokens up to a sum of P (default: 1)", probability),
        1.0,
    ),
    (
        LauncherOption("--repetition-penalty", "R", "penalty of tokens that occurred before (default: 1)", number),
        1.0,
    ),
    (LauncherOption("--batch-size", "N", "prompts that run together (default: 16)", count), 16),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm generate``."""
    parser.description = (
        "Continue prompts by the model of a checkpoint. Layout and number of processes may differ from those that "
        "saved; no optimizer state is built or read. Processes are started as by internlm train. Prompt i is sampled "
        "with the seed --seed + i, whatever the other prompts are. Exit code: 0, or 2 for an error that you can fix."
    )
    parser.add_argument("config", metavar="CONFIG", help="Python config file; it is executed")
    add = parser.add_argument
    folder = "checkpoint, or folder whose newest one is used, or folder of Hugging Face or Meta"
    add("--ckpt", required=True, metavar="CHECKPOINT|FOLDER", help=folder)
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    for option, default in _OPTIONS:
        add(option.flag, metavar=option.metavar, help=option.help, type=option.parse, default=default)
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TOKEN",
        help="id or name of a token after which to stop; repeatable (default: the tokenizer's eos token)",
    )
    add("--bos", action="store_true", help="begin each prompt with the bos token")
    add_overrides(parser)
    add_process_arguments(parser)
    add_launcher_options(parser)


def generate(arguments: argparse.Namespace) -> int:
    """Generate texts, and return the exit code.

    Raises:
        UserError: An argument is wrong, or the rendezvous has failed; or as on a rank.
    """
    others = argparse.Namespace(**{**vars(arguments), "config": None})  # --config is an option of internlm train only
    words = ["generate", arguments.config, f"--ckpt={arguments.ckpt}", *words_of(others)]
    for flag in ("--prompt", "--stop", *(option.flag for option, _ in _OPTIONS)):
        value = getattr(arguments, flag[2:].replace("-", "_"))
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [f"{flag}={value}" for value in values]
    return run_on_ranks(_run_rank, arguments, [*words, *(["--bos"] if arguments.bos else [])])


def _run_rank(arguments: argparse.Namespace) -> None:
    importlib.import_module("internlm.cli.generate_rank").generate_rank(arguments)
