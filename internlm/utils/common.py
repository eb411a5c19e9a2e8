"""Command-line parser whose errors suggest the nearest flag or command, and the arguments of training scripts.

This file must not import torch: ``--help`` and argument errors would take seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from internlm.utils.errors import EXIT_USER_ERROR, ConfigError, Problem, did_you_mean, report
from internlm.utils.lazy import lazy_exports


class FriendlyParser(argparse.ArgumentParser):
    """``ArgumentParser`` without abbreviations; it prints one line per wrong argument and exits with code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse ``args`` (default: the command line); the error for an unknown argument suggests the nearest flag."""
        words = sys.argv[1:] if args is None else list(args)
        # KEY= may also be an empty value, followed by the config file.
        if problems := [problem for problem, after in _blanks_around_equals(words) if not os.path.isfile(after)]:
            self._refuse(problems)
        # argparse itself would report unknown arguments without a suggestion.
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            problems = [problem for problem, _ in _blanks_around_equals(words)]
            self._refuse(problems or [self._unknown_argument(word, parsed) for word in _flags_or_all(unknown)])
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print ``message`` as a :class:`Problem` whose ``where`` is this command, and exit with code 2."""
        self._refuse([Problem(self.prog, message, f"See: {self.prog} --help")])

    def _refuse(self, problems: list[Problem]) -> NoReturn:
        report(ConfigError(*problems))
        self.exit(EXIT_USER_ERROR)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        command = isinstance(action, argparse._SubParsersAction)
        where = "/".join(action.option_strings) or str(action.metavar or action.dest)
        todo = did_you_mean(str(value), known) if command else f"Pass one of {', '.join(known)}"
        self._refuse([Problem(where, f"{str(value)!r} is unknown", todo)])

    def _unknown_argument(self, word: str, parsed: argparse.Namespace) -> Problem:
        flag, equals, _ = word.partition("=")
        if flag.startswith("-"):
            todo = did_you_mean(flag, self._known_flags(parsed))
        elif equals and "--set" in self._known_flags(parsed):
            todo = f"Write --set {word}: each override needs its own --set"
        else:
            todo = f"See: {self.prog} --help"
        return Problem(flag, "unknown argument", todo)

    def _known_flags(self, parsed: argparse.Namespace) -> Iterator[str]:
        """Yield the long flags of this parser and of the chosen sub-command."""
        for action in self._actions:
            yield from (flag for flag in action.option_strings if flag.startswith("--"))
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(parsed, action.dest, ""))
                yield from chosen._known_flags(parsed) if chosen else ()


def _blanks_around_equals(words: Sequence[str]) -> Iterator[tuple[Problem, str]]:
    """Yield a problem for each ``KEY = VALUE`` in ``words``, and the word that may be a file after an empty value.

    argparse would take ``KEY = VALUE`` for three arguments.
    """
    for before, word, after in zip(words, words[1:], [*words[2:], ""], strict=False):
        if word.startswith("=") and not before.startswith("-"):
            joined = f"{before}={after}" if word == "=" else f"{before}{word}"
            yield Problem(f"{before} {word}", "has blanks around '='", f"Write {joined}"), ""
        elif before == "--set" and word.endswith("=") and after and not after.startswith("-"):
            yield Problem(f"{word} {after}", "has blanks around '='", f"Write {word}{after}"), after


def _flags_or_all(unknown: list[str]) -> list[str]:
    """Return the flags in ``unknown``, or all words in it if none is a flag.

    A word beside an unknown flag may be the value of that flag, so it is not reported.
    """
    return [word for word in unknown if word.startswith("-")] or unknown


# -- training scripts ------------------------------------------------------------------------------------------------
def get_default_parser() -> argparse.ArgumentParser:
    """Build the parser of the built-in arguments; scripts add their own with ``add_argument`` before parsing."""
    parser = FriendlyParser(description="Train a model.")
    add_training_arguments(parser)
    return parser


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the built-in arguments of a training script to ``parser``."""
    add = parser.add_argument
    add("--config", type=str, help="Python config file")
    add_process_arguments(parser)
    add("--profiling", action="store_true", help="write torch profiler traces and a memory report")
    add("--pipeline-trace", action="store_true", help="draw one pipeline step, measured beside simulated")
    add("--ledger", action="store_true", help="print the bytes sent, by parallel mode and collective, at the end")
    add_overrides(parser)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the launcher, the rendezvous and the seed."""
    add = parser.add_argument
    add("--launcher", choices=["slurm", "torch"], help="launcher of the processes (default: detected)")
    add("--host", type=str, help="address of rank 0 (default: the launcher's)")
    add("--port", type=int, default=8888, help="port of rank 0 where torchrun sets none (default: %(default)s)")
    add("--world_size", type=int, help="number of processes (default: the launcher's)")
    add("--rank", type=int, help="rank of this process (default: the launcher's)")
    add("--local_rank", type=int, help="rank on this machine (default: the launcher's)")
    add("--backend", type=str, help="torch.distributed backend (default: nccl on CUDA, gloo on CPU)")
    add("--seed", type=int, default=1024, help="seed of initial values, data order and dropout (default: %(default)s)")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, such as data.micro_num=2",
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the built-in arguments from ``arguments`` (default: the command line)."""
    return get_default_parser().parse_args(arguments)


def words_of(arguments: argparse.Namespace) -> list[str]:
    """Return the words of a command line that :func:`parse_args` parses to ``arguments``; others of it are left out."""
    words = []
    for action in get_default_parser()._actions:
        value = getattr(arguments, action.dest, action.default)
        if value == action.default:
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            words.append(flag)
        else:
            words += [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


# An import of a name that this module had in older versions raises an error that names its replacement.
__getattr__, _ = lazy_exports(__name__, {})
