"""Rendezvous: the store by which the ranks of a job find each other, hosted by rank 0 or by torchrun's agent."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from internlm.initialize.environment import ProcessInfo
from internlm.utils.errors import LaunchError, Problem
from internlm.utils.logger import get_logger

CHECK_RANK_0 = "Check --host and --port, and that rank 0 is running"
#: Time in seconds for which a rank waits for rank 0 without a word; processes of a job rarely start at once.
_SECONDS_BEFORE_WARNING = 10.0
#: Seconds for which torch tries to connect to a store, and by which its last, random pause may exceed them.
_SECONDS_OF_ATTEMPT, _SECONDS_OF_LAST_TRY = 1.0, 2.0
#: Key in rank 0's store that counts the ranks that have connected to it.
_JOINED = "ranks that joined"


def make_store(process: ProcessInfo, timeout: timedelta) -> dist.Store:
    """Connect to the store of the job, which rank 0 or torchrun's agent hosts.

    torchrun keeps one store through all restarts of a job (``--max-restarts``). After a restart, this store still holds
    the addresses of ranks that have died, so each attempt gets a separate key prefix.

    Raises:
        LaunchError: Rank 0 cannot be reached, or the other ranks have not connected to it, within ``timeout``.
    """
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if process.rank == 0 and not agent_hosts:
        # Rank 0 reaches its own store by the loopback interface, even if the other ranks' address for it is wrong.
        store: dist.Store = dist.TCPStore(
            "localhost",
            process.port,
            process.world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.add(_JOINED, 1)
        _wait_until_joined(store, process, timeout.total_seconds())
        return store
    store = connect(process.host, process.port, timeout)
    if agent_hosts:
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.add(_JOINED, 1)
    return store


def _wait_until_joined(store: dist.Store, process: ProcessInfo, timeout: float) -> None:
    """Block until all ranks have connected to the store that this rank hosts.

    torch would wait as well, but log nothing meanwhile.

    Raises:
        LaunchError: A rank has not connected within ``timeout`` seconds.
    """
    where, size = f"{process.host}:{process.port}", process.world_size
    deadline, warn_at = time.monotonic() + timeout, time.monotonic() + _SECONDS_BEFORE_WARNING
    while (joined := store.add(_JOINED, 0)) < size:
        now = time.monotonic()
        if now >= deadline:
            message = f"only {joined} of {size} ranks joined within {timeout:g} s"
            raise LaunchError(Problem(where, message, "Check --host and --port, and that every rank is running"))
        if now >= warn_at:
            warn_at = deadline  # once
            get_logger().warning(f"waiting at {where}: only {joined} of {size} ranks joined")
        time.sleep(min(0.05, deadline - now))


def connect(host: str, port: int, timeout: timedelta) -> dist.Store:
    """Block until the store at ``host`` and ``port`` answers, and return a client of it.

    torch would wait as well, but print two C++ stack traces for each failed attempt, and wait forever for a server that
    accepts the connection and never answers.

    Raises:
        LaunchError: No store has answered within ``timeout``.
    """
    seconds, attempt = timeout.total_seconds(), None
    deadline, warn_at = time.monotonic() + seconds, time.monotonic() + _SECONDS_BEFORE_WARNING
    while True:
        # A host that drops packets answers nothing; an attempt of minutes would delay the warning.
        limit = min(max(deadline - time.monotonic(), 0.1), _SECONDS_BEFORE_WARNING)
        reason = "" if attempt else _why_unreachable(host, port, limit)
        if not reason:
            with _without_stack_traces():
                attempt = attempt or _start_attempt(host, port, min(limit, _SECONDS_OF_ATTEMPT))
                wait_for([attempt], min(limit, _SECONDS_OF_ATTEMPT) + _SECONDS_OF_LAST_TRY)
            reason = "what listens there does not answer as rank 0 does"
            if attempt.done():
                if not attempt.exception():
                    store = attempt.result()
                    store.set_timeout(timeout)
                    return store
                attempt = None
        now = time.monotonic()
        if now >= deadline:
            problem = Problem(f"{host}:{port}", f"cannot be reached within {seconds:g} s ({reason})", CHECK_RANK_0)
            raise LaunchError(problem)
        if now >= warn_at:
            warn_at = deadline  # once
            get_logger().warning(f"waiting for rank 0 at {host}:{port} ({reason})")
        time.sleep(min(0.2, deadline - now))


def _why_unreachable(host: str, port: int, limit: float) -> str:
    """Return why no connection is possible within ``limit`` seconds; an empty string if one is."""
    try:
        with socket.create_connection((host, port), timeout=limit) as connection:
            # The system may choose the port itself as the source of the connection, which then meets itself.
            return "nobody listens" if connection.getsockname() == connection.getpeername() else ""
    except (OSError, UnicodeError) as error:  # UnicodeError: no valid host name
        return getattr(error, "strerror", None) or str(error)


def _start_attempt(host: str, port: int, limit: float) -> Future[dist.Store]:
    """Connect to a store in a thread, which a server that never answers blocks until the process ends."""
    attempt: Future[dist.Store] = Future()

    def connect_to_store() -> None:
        try:
            attempt.set_result(
                dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=limit), wait_for_workers=False)
            )
        except RuntimeError as error:
            attempt.set_exception(error)

    threading.Thread(target=connect_to_store, daemon=True).start()
    return attempt


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Drop warnings of torch's C++ code, with their stack traces, from what is written to stderr in the block.

    Python code cannot set the log level of torch's C++ code after the import of torch.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, os.fdopen(os.dup(2), "wb", buffering=0) as stderr:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            file.seek(0)
            text = file.read()
            if b"[c10d]" not in text:
                stderr.write(text)
