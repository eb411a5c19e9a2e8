"""The console command ``internlm``: a table of subcommands whose functions are imported when they run.

This file and the parsers import neither torch nor pydantic, so that ``--help`` and argument errors are printed at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

import internlm
from internlm.cli import ckpt_parsers, convert_parsers, data_parsers, generation, launch_options, parsers
from internlm.utils.common import FriendlyParser
from internlm.utils.errors import exit_on_user_error

#: Exit code of a program ended by SIGPIPE, as shells report it.
EXIT_CLOSED_PIPE = 128 + 13
#: Exit code after Ctrl-C.
EXIT_INTERRUPTED = 128 + 2


class Command(NamedTuple):
    """Subcommand of ``internlm``, with its arguments and the function that runs it."""

    name: str
    help: str
    """Description in ``internlm --help``."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    function: str
    """``module:name`` of the function that takes the parsed arguments and returns the exit code or None."""


_FOLDER, _CONTENT = "internlm.cli.ckpt_folder", "internlm.cli.ckpt_content"
CKPT_COMMANDS = (
    Command("diff", "compare two checkpoints", ckpt_parsers.diff, f"{_CONTENT}:diff"),
    Command("ls", "list the checkpoints of a folder", ckpt_parsers.ls, f"{_FOLDER}:list_folder"),
    Command("prune", "delete old checkpoints", ckpt_parsers.prune, f"{_FOLDER}:prune"),
    Command("show", "show what a checkpoint contains", ckpt_parsers.show, f"{_CONTENT}:show"),
    Command("verify", "compare all bytes with their checksums", ckpt_parsers.verify, f"{_CONTENT}:verify"),
)
_CONVERTING = "internlm.cli.converting"
CONVERT_COMMANDS = (
    Command("from-hf", "a Hugging Face folder as a checkpoint", convert_parsers.from_hf, f"{_CONVERTING}:from_hf"),
    Command(
        "from-internevo",
        "a checkpoint of InternEvo's earlier versions",
        convert_parsers.from_internevo,
        f"{_CONVERTING}:from_internevo",
    ),
    Command("from-llama", "a release of Meta as a checkpoint", convert_parsers.from_llama, f"{_CONVERTING}:from_llama"),
    Command("to-hf", "a checkpoint as a Hugging Face folder", convert_parsers.to_hf, f"{_CONVERTING}:to_hf"),
)
DATA_COMMANDS = (
    Command(
        "convert", "convert token files to another format", data_parsers.convert, "internlm.cli.data_files:convert"
    ),
    Command("replay", "run the micro-batches of a step again", data_parsers.replay, "internlm.cli.replay:replay"),
    Command("show", "show which samples a step has read", data_parsers.show, "internlm.cli.data_show:show"),
)


def ckpt(parser: argparse.ArgumentParser) -> None:
    """Add the commands of ``internlm ckpt``."""
    parser.description = "Examine, compare and delete checkpoints, without a GPU and without other processes."
    _add_commands(parser, "ckpt_command", CKPT_COMMANDS)


def convert(parser: argparse.ArgumentParser) -> None:
    """Add the commands of ``internlm convert``."""
    parser.description = "Convert models from and to Hugging Face folders, without a GPU and in bounded memory."
    _add_commands(parser, "convert_command", CONVERT_COMMANDS)


def data(parser: argparse.ArgumentParser) -> None:
    """Add the commands of ``internlm data``."""
    parser.description = "Examine and convert data."
    _add_commands(parser, "data_command", DATA_COMMANDS)


COMMANDS = (
    Command("ckpt", "list, show, verify, compare and delete checkpoints", ckpt, ""),
    Command("config", "show what a config resolves to", parsers.config, "internlm.cli.show_config:show_config"),
    Command("convert", "convert from and to Hugging Face", convert, ""),
    Command("data", "show or replay the data of a step, convert token files", data, ""),
    Command("dryrun", "run ranks of any world on a pretended device", parsers.dryrun, "internlm.cli.dry:dry_run"),
    Command("eval", "evaluate a checkpoint", launch_options.evaluation, "internlm.cli.evaluation:evaluate"),
    Command("generate", "continue texts by a checkpoint", generation.add_arguments, "internlm.cli.generation:generate"),
    Command("memory", "estimate the memory of each rank", parsers.memory, "internlm.cli.commands:estimate_memory"),
    Command("schedule", "draw or check a pipeline schedule", parsers.schedule, "internlm.cli.commands:draw_schedule"),
    Command("tokenize", "turn text into token files", parsers.tokenize, "internlm.cli.tokenizing:tokenize"),
    Command("train", "train a model", launch_options.train, "internlm.cli.training:train"),
    Command("verify", "compare a multi-rank with a single-rank run", parsers.verify, "internlm.cli.commands:verify"),
)


def get_parser() -> FriendlyParser:
    """Build the parser of ``internlm`` with all its subcommands."""
    parser = FriendlyParser(prog="internlm", description="Pretrain large language models.")
    parser.add_argument("--version", action="version", version=f"internlm {internlm.__version__}")
    _add_commands(parser, "command", COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, dest: str, commands: Sequence[Command]) -> None:
    subparsers = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(command.name, help=command.help)
        command.add_arguments(subparser)
        # A command of a command has set the function already, and its value takes precedence.
        subparser.set_defaults(function=command.function)


def run(arguments: argparse.Namespace) -> int | None:
    """Import and call the function of the chosen subcommand."""
    module, _, name = arguments.function.partition(":")
    function: Callable[[Any], int | None] = getattr(importlib.import_module(module), name)
    return function(arguments)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run ``internlm`` with ``arguments`` (default: ``sys.argv[1:]``); return the exit code, or None on success."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be ASCII; the default is an error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _main(arguments)
        finally:
            if sys.stdout is not None:  # None if the process was started with stdout closed
                sys.stdout.flush()  # here, where a closed pipe can be handled, rather than when the interpreter exits
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_closed_pipe(stream)]
        if not closed:
            raise  # another pipe, such as one to a worker process
        # The reader, such as ``head``, has closed the pipe. Python flushes once more at exit: discard that.
        for stream in closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_CLOSED_PIPE


@exit_on_user_error
def _main(arguments: Sequence[str] | None) -> int | None:
    return run(get_parser().parse_args(arguments))


def _is_closed_pipe(stream: TextIO) -> bool:
    """Return whether ``stream`` is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # POLLERR and POLLHUP are always reported
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
