"""Requests to save or to stop, which any rank may receive and all ranks follow at the same step.

A rank collects its requests in an :class:`Inbox`; the hook :class:`~internlm.train.hooks.FollowRequests` exchanges them
after every step. This file must not import torch, because signals are handled before it is imported.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from enum import Enum

from internlm.utils.errors import EXIT_USER_ERROR


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Meaning of a request, for all ranks."""

    source: str
    """Where the request comes from, in log lines; ``{rank}`` is the rank that received it."""
    stops: bool = True
    """Whether the run stops after the step."""
    saves: bool = True
    """Whether the step is saved. If not, the ranks must not save it, even if it is due."""
    exit_code: int = 0
    """Exit code of a run that stops."""


class Request(Enum):
    """Requests. If several stop the run in one step, the first in this order gives the exit code."""

    LEASE_LOST = Effect(
        source="the lease of the save folder, found lost by rank {rank}", saves=False, exit_code=EXIT_USER_ERROR
    )
    """Another run owns the save folder, so nothing may be written to it."""
    SAVE_FAILED = Effect(source="a failed save of rank {rank}", saves=False, exit_code=EXIT_USER_ERROR)
    """A save in the background failed."""
    TERMINATE = Effect(source="SIGTERM on rank {rank}", exit_code=128 + signal.SIGTERM)
    INTERRUPT = Effect(source="SIGINT on rank {rank}", exit_code=128 + signal.SIGINT)
    HANG_UP = Effect(source="SIGHUP on rank {rank}", exit_code=128 + signal.SIGHUP)
    LAUNCHER_DIED = Effect(source="the launcher of rank {rank} died", exit_code=128 + signal.SIGTERM)
    STOP_FILE = Effect(source="stop file")
    SAVE = Effect(source="SIGUSR1 on rank {rank}", stops=False)
    SAVE_BY_FILE = Effect(source="stop file", stops=False)


#: Requests that signals make.
REQUEST_OF_SIGNAL = {
    signal.SIGTERM: Request.TERMINATE,
    signal.SIGINT: Request.INTERRUPT,
    signal.SIGHUP: Request.HANG_UP,
    signal.SIGUSR1: Request.SAVE,
}


class Inbox:
    """Requests of this rank that have not been exchanged; any thread may add one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: set[Request] = set()

    def add(self, request: Request) -> None:
        """Add ``request``; a request that is in the inbox already counts once."""
        with self._lock:
            self._requests.add(request)

    def asks_to_stop(self) -> bool:
        """Return whether a request in the inbox stops the run; the requests stay there."""
        with self._lock:
            return any(request.value.stops for request in self._requests)

    def take(self) -> set[Request]:
        """Return all requests and empty the inbox."""
        with self._lock:
            taken, self._requests = self._requests, set()
            return taken
