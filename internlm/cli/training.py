"""Subcommand ``internlm train``: train in this process, or on ranks that torchrun's API starts; and ``train.py``.

This file must not import torch, which takes seconds: signals are handled before.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from internlm.utils.common import parse_args, words_of
from internlm.utils.errors import ConfigError, LaunchError, Problem, exit_on_user_error
from internlm.utils.stop_signals import STOP_SIGNALS, catch_signals


# -- a rank -----------------------------------------------------------------------------------------------------------
@exit_on_user_error
def main() -> None:
    """Train on one rank, with the arguments of the command line; ``train.py`` calls this function."""
    _run_rank(parse_args())


def _run_rank(arguments: argparse.Namespace) -> None:
    signals = catch_signals()
    importlib.import_module("internlm.cli.rank").train_rank(arguments)
    if code := signals.final_exit_code():
        sys.exit(code)


def _be_only_rank(arguments: argparse.Namespace) -> None:
    """Make this process the only rank of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        arguments.host, arguments.port = free.getsockname()
    arguments.rank, arguments.local_rank, arguments.world_size = 0, 0, 1


# -- internlm train ---------------------------------------------------------------------------------------------------
def train(arguments: argparse.Namespace) -> int:
    """Train, and return the exit code.

    With an option of torchrun, this process is the launcher of the ranks. Without one it is a rank: the only one, or
    that of a launcher which has set its variables.

    Raises:
        UserError: An argument is wrong, or the rendezvous has failed; or as on a rank.
    """
    if (arguments.config is None) is (arguments.config_file is None):
        message = "not given" if arguments.config is None else "given twice"
        raise ConfigError(Problem("CONFIG", message, "Pass one config file, such as configs/demo.py"))
    arguments.config = arguments.config or arguments.config_file
    return run_on_ranks(_run_rank, arguments, ["train", *words_of(arguments)])


def run_on_ranks(
    run_rank: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, words: Sequence[str]
) -> int:
    """Run a command on its ranks, and return the exit code.

    Args:
        run_rank: Function that runs a rank in this process.
        arguments: Parsed arguments. With an option of torchrun, this process starts the ranks; otherwise it is one.
        words: Words of the same command without the options of torchrun, which a rank that is started gets.

    Raises:
        UserError: An argument is wrong, or the rendezvous has failed; or as on a rank.
    """
    if arguments.launcher_words:
        if "RANK" in os.environ:
            message = "given, but RANK is set: this process is a rank already"
            raise LaunchError(Problem(arguments.launcher_words[0].partition("=")[0], message, "Use one launcher only"))
        return launch(arguments.launcher_words, ["-m", "internlm", *words])
    if arguments.rank is None and arguments.launcher is None and not os.environ.keys() & {"RANK", "SLURM_PROCID"}:
        _be_only_rank(arguments)
    run_rank(arguments)
    return 0


def launch(options: Sequence[str], script: Sequence[str]) -> int:
    """Run a script on the ranks of this machine, and return the exit code of the job.

    Args:
        options: Options of torchrun.
        script: Script with its arguments, as torchrun takes them.

    Raises:
        LaunchError: An option is wrong, or the rendezvous has failed.
    """
    for number in STOP_SIGNALS:  # until torch handles them
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_before_ranks)
    # If another launcher has the rendezvous store and ends first, torch's C++ warns of it at length. Its import
    # reads the variable, which is not for the ranks.
    is_set = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    elastic = importlib.import_module("internlm.cli.elastic")
    if not is_set:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    return int(elastic.run_ranks(options, script))


def _leave_before_ranks(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(2, f"{name}: no rank was started, exiting {128 + number}\n".encode())
    raise SystemExit(128 + number)
