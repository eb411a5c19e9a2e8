"""Ports of the loopback interface for processes that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

#: Below the ports of outgoing connections, one of which could take a free port before it is used.
FIRST, LAST = 12_000, 30_000


def free_port() -> int:
    """Return a port that nobody listens on."""
    while True:
        port = random.SystemRandom().randint(FIRST, LAST)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
