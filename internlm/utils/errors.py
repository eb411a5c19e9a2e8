"""Errors for people: what is wrong, where, with which values, and what to do about it.

A :class:`UserError` is never a bug of the framework: it reports something that the user can mend. Entry points print it
without a traceback and exit with code 2 (:func:`exit_on_user_error`).

The nearest known name for a mistyped one.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

EXIT_USER_ERROR = 2
EXIT_LOST_PEER = 3
#: What gloo says of a rank that is gone or silent, in errors without a type of their own.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``<where>: <what>. <todo>``."""

    where: str  # config key, file, flag or variable
    what: str  # what is wrong, with the values
    todo: str = ""  # what to do

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}".rstrip(".")
        return f"{text}. {self.todo}" if self.todo else text


class UserError(Exception):
    """One or more problems that the user can mend."""

    #: True where every rank finds the same problems, so that one of them is enough to print them.
    same_on_all_ranks = False

    def __init__(self, *problems: Problem) -> None:
        assert problems, "a UserError needs at least one Problem"
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class ConfigError(UserError):
    """Problems of the config file, its overrides or the command line."""

    same_on_all_ranks = True


class LaunchError(UserError):
    """Problems of the environment in which the processes were started."""


class DataError(UserError):
    """Problems of a data file or folder."""


class CheckpointError(UserError):
    """Problems of a checkpoint."""


class LostPeerError(RuntimeError):
    """Another rank is gone, or does not do its part in time; the text says which."""


#: How long a silent rank lets another speak before it exits: a launcher ends every process once one has failed.
_GRACE_SECONDS = 2.0


#: Said by a rank that stops, so that others know why it has left them.
_STOPPED = "a rank stopped by a user's error"


def report(error: UserError) -> None:
    """Print the problems of ``error`` to stderr, a line each; where several ranks would say the same, one of them
    does."""
    _times_said(_STOPPED, 1)
    if not _speaks(error):
        time.sleep(_GRACE_SECONDS)
        return
    for problem in error.problems:
        print(problem, file=sys.stderr, flush=True)


def _speaks(error: UserError) -> bool:
    """The first to say it, where the ranks can talk; rank 0 before that, for what all ranks find alike."""
    if dist.is_initialized():
        return first_of_all_ranks(str(error))
    return not error.same_on_all_ranks or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def first_of_all_ranks(topic: str) -> bool:
    """Whether no other rank has asked the same before: for what is to be said once a job. Needs no collective."""
    return _times_said(topic, 1) == 1


def _times_said(topic: str, more: int = 0) -> int:
    """How often this job's ranks have said ``topic``, counting ``more`` times now."""
    key = hashlib.sha256(topic.encode()).hexdigest()
    try:
        return int(dist.distributed_c10d._get_default_store().add(f"internlm/said/{key}", more))
    except (dist.DistError, ValueError):  # the rank that kept the store is gone, or there is no job of several ranks
        return more


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST_PEER)


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(".")


def exit_on_user_error(main: F) -> F:
    """Decorate an entry point: a :class:`UserError` becomes its message on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            report(error)
            sys.exit(EXIT_USER_ERROR)
        except LostPeerError as error:
            print(f"{error}. See what that rank said", file=sys.stderr, flush=True)
            sys.exit(EXIT_LOST_PEER)
        except RuntimeError as error:
            if not lost_peer(error):
                raise
            if not _times_said(_STOPPED):
                rank = os.environ.get("RANK", "?")
                print(f"rank {rank}: lost another rank ({_last_line(error)}). See what it said", file=sys.stderr)
                sys.exit(EXIT_LOST_PEER)
            sys.exit(EXIT_USER_ERROR)

    return wrapper  # type: ignore[return-value]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'?"`` where a known name is near ``name``, else a list of what is known."""
    known = sorted(known)
    by_folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f"Did you mean '{by_folded[near[0]]}'?" if near else f"Known: {', '.join(known)}."
