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


def get_logger(name: str = NAME) -> logging.Logger:
    """Return the framework's logger or its child ``name``; it logs to stderr unless the application added handlers."""
    root = logging.getLogger(NAME)
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_RankFormatter("%(asctime)s %(levelname)s%(rank)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("INTERNLM_LOG_LEVEL", "INFO").upper())
        # Otherwise, if users add a handler to the root logger later, each line would be printed twice.
        root.propagate = False
    # A child, so that a script's get_logger(__file__) logs to the same places.
    return root if name == NAME else root.getChild(name.removeprefix(f"{NAME}."))
