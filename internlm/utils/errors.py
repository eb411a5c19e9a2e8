"""Errors that users can fix: what is wrong, where, with which values, and what to do about it.

A :class:`UserError` is never a bug of the framework. Entry points print it without a traceback and exit with code 2
(:func:`exit_on_user_error`). A rank that lost a peer exits with code 3.

This file must not import torch: the command line's ``--help`` and its argument errors would take seconds.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, TypeVar

EXIT_USER_ERROR = 2
EXIT_LOST_PEER = 3
#: Texts in gloo's errors for a rank that exited or does not respond. gloo raises a plain ``RuntimeError``.
_PEER_FAILURE_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Problem:
    """One mistake, formatted as ``<where>: <message>. <todo>``."""

    where: str  # config key, file, flag or variable
    message: str  # what is wrong, with the values
    todo: str = ""  # what to do

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}".rstrip(".")
        return f"{text}. {self.todo}" if self.todo else text


class UserError(Exception):
    """Error that the user can fix, with one or more problems."""

    #: True if every rank finds the same problems, so that only one rank prints them.
    same_on_all_ranks = False

    def __init__(self, *problems: Problem) -> None:
        assert problems, "a UserError needs at least one Problem"
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class ConfigError(UserError):
    """Error in the config file, its overrides or the command line."""

    same_on_all_ranks = True


class LaunchError(UserError):
    """Error in the launch: launcher variables, rendezvous, devices or the version of torch."""


class DataError(UserError):
    """Error for a missing, unreadable or malformed data file or folder."""


class CheckpointError(UserError):
    """Error for a missing, unusable or unwritable checkpoint."""


class DamagedCheckpointError(CheckpointError):
    """Error for a checkpoint that does not verify, so that an older one may be loaded instead."""


class LostPeerError(RuntimeError):
    """Error for a lost peer: a rank that exited, or did not send or receive in time. The message names the peer."""


#: Time in seconds that a rank with nothing to print waits before it exits, so that another rank can print: torchrun
#: ends every process of a job as soon as one of them has failed.
_GRACE_SECONDS = 2.0
#: Topic that a rank counts in the store when it stops with a :class:`UserError`, so that peers can find the reason.
_STOPPED = "a rank stopped by a user's error"


def report(error: UserError) -> None:
    """Print the problems of ``error`` to stderr, one per line, unless another rank prints the same problems.

    A rank that prints nothing waits for two seconds, so that the other rank can print before torchrun ends the job.
    """
    _count_in_store(_STOPPED, 1)
    if not _is_reporting_rank(error):
        time.sleep(_GRACE_SECONDS)
        return
    for problem in error.problems:
        print(problem, file=sys.stderr, flush=True)


def _is_reporting_rank(error: UserError) -> bool:
    """Return whether this rank prints ``error``.

    If there is a process group, the first rank that found the error prints it. Otherwise rank 0 prints the errors that
    all ranks find, and any other error is printed where it occurs.
    """
    dist = _loaded_distributed()
    if dist is not None and dist.is_initialized():
        return first_of_all_ranks(str(error))
    return not error.same_on_all_ranks or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def first_of_all_ranks(topic: str) -> bool:
    """Return True on the first rank that calls this function with ``topic``, and False on all others.

    The calls are counted in the rendezvous store, so no collective is needed.
    """
    return _count_in_store(topic, 1) == 1


def _count_in_store(topic: str, increment: int = 0) -> int:
    """Add ``increment`` to the job-wide count of ``topic`` and return the new count."""
    dist = _loaded_distributed()
    if dist is None:
        return increment
    from internlm.utils.torch_private import default_store  # imports torch, which is loaded here

    key = hashlib.sha256(topic.encode()).hexdigest()
    try:
        return int(default_store().add(f"internlm/said/{key}", increment))
    except (dist.DistError, ValueError):  # the rank that hosts the store has exited, or there is no process group
        return increment


def _loaded_distributed() -> ModuleType | None:
    """Return ``torch.distributed`` if it has been imported, else None, in which case no process group can exist."""
    return sys.modules.get("torch.distributed")


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether a collective, a send or a receive failed because another rank exited or does not respond."""
    dist = _loaded_distributed()
    if dist is not None and isinstance(error, dist.DistError):
        return True
    return any(text in str(error) for text in _PEER_FAILURE_TEXTS)


def _last_line(error: RuntimeError) -> str:
    """Return the last line of an error's text, where gloo gives the reason, without gloo's ``[file:line]`` prefix."""
    return str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(".")


def exit_on_user_error(main: F) -> F:
    """Decorate an entry point to print a :class:`UserError` without a traceback and exit with code 2.

    After a peer failure, the entry point exits with code 3.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            report(error)
            sys.exit(EXIT_USER_ERROR)
        except LostPeerError as error:
            print(f"{error}. See the log of that rank", file=sys.stderr, flush=True)
            sys.exit(EXIT_LOST_PEER)
        except RuntimeError as error:
            if not is_peer_failure(error):
                raise
            # A peer that stopped with a UserError has printed it. A second message would only distract from it.
            if _count_in_store(_STOPPED):
                sys.exit(EXIT_USER_ERROR)
            rank = os.environ.get("RANK", "?")
            print(f"rank {rank}: lost another rank ({_last_line(error)}). See the other ranks' logs", file=sys.stderr)
            sys.exit(EXIT_LOST_PEER)

    return wrapper  # type: ignore[return-value]


def report_uncaught_user_errors() -> None:
    """Print a :class:`UserError` that no code catches without a traceback, in the whole process; its exit code is 1.

    For scripts in which some calls are outside of the function that :func:`exit_on_user_error` decorates.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            report(error)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook


def format_by_rank(values: Sequence[object]) -> str:
    """Format one value per rank, with the ranks grouped by value: ``"ranks 0-6, 9: a; rank 7: b"``."""
    groups: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {_format_ranges(ranks)}: {value}" for value, ranks in groups.items()
    )


def _format_ranges(numbers: Iterable[int]) -> str:
    """Format ascending numbers as ranges: ``"0-6, 9"``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Suggest the known name nearest to ``name`` ("Did you mean 'x'?").

    If there is none, return ``otherwise``, by default a list of all known names.
    """
    known = sorted(known)
    by_folded = {candidate.casefold(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f"Did you mean '{by_folded[nearest[0]]}'?" if nearest else otherwise or known_names(known)


def known_names(known: Iterable[str]) -> str:
    """List the known names, where the nearest one would mislead."""
    return f"Known: {', '.join(sorted(known))}."
