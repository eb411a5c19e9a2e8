"""Errors that users can fix: what is wrong, where, with which values, and what to do about it.

A :class:`UserError` is never a bug of the framework. Entry points print it without a traceback and exit with code 2
(:func:`exit_on_user_error`). A rank that lost a peer exits with code 3.

This file must not import torch: the command line's ``--help`` and its argument errors would take seconds.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

from internlm.utils.job_store import count_in_store, first_on_host, loaded_distributed
from internlm.utils.lost_ranks import (
    EXIT_FAILURE,
    Finding,
    find_lost_rank,
    format_ranks,
    print_finding,
    record_failure,
)
from internlm.utils.progress import end_within_limit

EXIT_USER_ERROR = 2
#: Texts in gloo's errors for a rank that exited or does not respond. gloo raises a plain ``RuntimeError``.
_PEER_FAILURE_TEXTS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
    "Timed out waiting", "Operation timed out", "timeout caused pair closure", "Read timeout", "Write timeout",
)  # fmt: skip

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

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


#: Time in seconds that a rank with nothing to print waits before it exits, so that another rank can print: torchrun
#: ends every process of a job as soon as one of them has failed.
_GRACE_SECONDS = 2.0


def report(error: UserError) -> None:
    """Print the problems of ``error`` to stderr, one per line, unless another rank prints the same problems.

    A rank that prints nothing waits for two seconds, so that the other rank can print before torchrun ends the job.
    """
    record_failure(error, EXIT_USER_ERROR)
    if not _is_reporting_rank(error):
        time.sleep(_GRACE_SECONDS)
        return
    for problem in error.problems:
        print(problem, file=sys.stderr, flush=True)


def _is_reporting_rank(error: UserError) -> bool:
    """Return whether this rank prints ``error``.

    If there is a process group, the first rank that found the error prints it. Otherwise rank 0 prints the errors that
    all ranks find, and any other error is printed by the first rank of each host that finds it.
    """
    dist = loaded_distributed()
    if dist is not None and dist.is_initialized():
        return first_of_all_ranks(str(error))
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    if rank is None:
        return True
    return rank == "0" if error.same_on_all_ranks else first_on_host(f"{os.environ.get('MASTER_PORT')} {error}")


def first_of_all_ranks(topic: str) -> bool:
    """Return True on the first rank that calls this function with ``topic``, and False on all others.

    The calls are counted in the rendezvous store, so no collective is needed. If the store cannot be reached, every
    rank is the first.
    """
    return count_in_store(topic, 1) == 1


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether a collective, a send or a receive failed because another rank exited or does not respond."""
    dist = loaded_distributed()
    if dist is not None and isinstance(error, dist.DistError):
        return True
    return any(text in str(error) for text in _PEER_FAILURE_TEXTS)


def _last_line(error: RuntimeError) -> str:
    """Return the last line of an error's text, where gloo gives the reason, without gloo's ``[file:line]`` prefix."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].rpartition("] ")[2].rstrip(".")


def lost_peer_error(error: RuntimeError, waited_for: str = "") -> LostPeerError:
    """Find out which rank is lost after a wait has failed with ``error``.

    Args:
        error: Error of a collective, a send or a receive.
        waited_for: What this rank waited for, if that is known.
    """
    finding = find_lost_rank(_last_line(error))
    if waited_for and finding.message:
        finding = replace(finding, message=f"{finding.message} ({waited_for})")
    return LostPeerError(finding)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Convert the error of a wait that fails in the ``with`` block into one that names the lost rank.

    Raises:
        LostPeerError: A wait failed because a rank is gone, silent or behind.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostPeerError) or not is_peer_failure(error):
            raise
        raise lost_peer_error(error) from None


_before_success: list[Callable[[], None]] = []


def call_before_success(function: Callable[[], None]) -> None:
    """Call ``function`` when a main function has returned that :func:`exit_on_user_error` decorates.

    An error that it raises counts as one of the main function, while an exit handler could not set the exit code.
    """
    _before_success.append(function)


def exit_on_user_error(main: F) -> F:
    """Decorate an entry point to print a :class:`UserError` without a traceback and exit with code 2.

    After a peer failure, the entry point exits with code 3, and one rank of the job prints which rank is lost. Other
    exceptions are raised. A process that has failed ends within seconds, also if its threads wait for other ranks.
    Functions that were passed to :func:`call_before_success` are part of the entry point.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            with naming_lost_ranks():
                result = main(*args, **kwargs)
                for function in _before_success:
                    function()
                return result
        except UserError as error:
            end_within_limit(EXIT_USER_ERROR)
            report(error)
            sys.exit(EXIT_USER_ERROR)
        except LostPeerError as error:
            end_within_limit(error.finding.exit_code)
            print_finding(error.finding)
            sys.exit(error.finding.exit_code)
        except SystemExit as error:
            if error.code:
                end_within_limit(error.code if isinstance(error.code, int) else EXIT_FAILURE)
            raise
        except Exception as error:
            end_within_limit(EXIT_FAILURE)
            record_failure(error, EXIT_FAILURE)
            raise

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
    return "; ".join(f"{format_ranks(ranks)}: {value}" for value, ranks in groups.items())


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
