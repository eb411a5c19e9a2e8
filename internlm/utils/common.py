"""Command-line parser whose errors suggest the nearest flag or command, and a re-export of ``parse_args``."""

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


__getattr__, __dir__ = lazy_exports(__name__, {"parse_args": "internlm.initialize.launch"})
