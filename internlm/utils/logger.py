"""The framework's logger: each line has the time, the level and, in a job of several processes, the rank."""

from __future__ import annotations

import logging
import os
import sys

NAME = "internlm"


class _RankFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK")
        record.rank = f" rank {rank}" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        return super().format(record)


class FailureNotice:
    """Notice of the first failure of a destination, and of the first success after it; no other one is logged.

    A destination that fails in every step, or in every second one, would fill the log.
    """

    def __init__(self, name: str) -> None:
        self.name, self._failed, self._recovered = name, False, False

    def failed(self, error: Exception) -> None:
        """Log a warning if this is the first failure."""
        if not self._failed:
            self._failed = True  # first, since the warning may fail at the same destination
            get_logger().warning(f"{self.name} cannot be written, and is tried again each time: {error}")

    def succeeded(self) -> None:
        """Log that the destination can be written again if this is the first success after a failure."""
        if self._failed and not self._recovered:
            self._recovered = True
            get_logger().warning(f"{self.name} can be written again; what it lacks is lost")


class _Console(logging.StreamHandler):
    """Handler of stderr, which may be closed, or a file on a full disk."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._notice, self._is_written = FailureNotice("stderr"), True

    def emit(self, record: logging.LogRecord) -> None:
        self._is_written = True
        super().emit(record)
        if self._is_written:
            self._notice.succeeded()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        # By default, logging writes a traceback to stderr, and raises if stderr is closed.
        error = sys.exc_info()[1]
        self._is_written = False
        if isinstance(error, Exception):
            self._notice.failed(error)


def get_logger(name: str = NAME) -> logging.Logger:
    """Return the framework's logger or its child ``name``; it logs to stderr unless the application added handlers."""
    root = logging.getLogger(NAME)
    if not root.handlers and not logging.getLogger().handlers:
        handler: logging.Handler = _Console() if sys.stderr else logging.NullHandler()  # None: closed at the start
        handler.setFormatter(_RankFormatter("%(asctime)s %(levelname)s%(rank)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("INTERNLM_LOG_LEVEL", "INFO").upper())
        # Otherwise, if users add a handler to the root logger later, each line would be printed twice.
        root.propagate = False
    # A child, so that a script's get_logger(__file__) logs to the same places.
    return root if name == NAME else root.getChild(name.removeprefix(f"{NAME}."))
