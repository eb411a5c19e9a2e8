"""Rendezvous: the store by which the ranks of a job find each other, hosted by rank 0 or by torchrun's agent."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from internlm.initialize.environment import ProcessInfo
from internlm.utils.errors import EXIT_USER_ERROR, LaunchError, Problem
from internlm.utils.job_store import first_on_host
from internlm.utils.logger import get_logger
from internlm.utils.lost_ranks import format_ranks, hosted_by_launcher
from internlm.utils.progress import exit_now
from internlm.utils.torch_private import without_cpp_logs

CHECK_RANK_0 = "Check --host and --port, and that rank 0 is running"
_CHECK_RANKS = "Check --host and --port, and that every rank is running"
#: Time in seconds for which a rank waits for rank 0 without a word; processes of a job rarely start at once.
_SECONDS_BEFORE_WARNING = 10.0
#: Seconds for which torch tries to connect to a store, and by which its last, random pause may exceed them.
_SECONDS_OF_ATTEMPT, _SECONDS_OF_LAST_TRY = 1.0, 2.0
#: Seconds in which ranks read the outcome before rank 0, whose process may hold the store, ends.
_SECONDS_TO_READ = 1.0
#: Seconds after the timeout in which a process that is not blocked reports it.
_SECONDS_OF_GRACE = 4.0
#: Keys in the store: the count of the ranks that have joined, also with the number of each of them; and what is wrong,
#: an empty string if all ranks have joined.
_JOINED, _OUTCOME = "ranks that joined", "outcome of joining"

T = TypeVar("T")


def make_store(process: ProcessInfo, timeout: timedelta) -> dist.Store:
    """Connect to the store of the job, which rank 0 or torchrun's agent hosts.

    torchrun keeps one store through all restarts of a job (``--max-restarts``). After a restart, this store still holds
    the addresses of ranks that have died, so each attempt gets a separate key prefix.

    Raises:
        LaunchError: Rank 0 cannot be reached, or the other ranks have not connected to it, within ``timeout``.
    """
    if process.rank == 0 and not hosted_by_launcher():
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
    else:
        store = connect(process.host, process.port, timeout)
    if hosted_by_launcher():
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _wait_until_joined(store, process, timeout.total_seconds())
    return store


def _wait_until_joined(store: dist.Store, process: ProcessInfo, timeout: float) -> None:
    """Register this rank in the store, and block until all ranks have done so.

    Raises:
        LaunchError: A rank has not registered within ``timeout`` seconds, or two processes have the same rank.
    """
    if store.add(f"{_JOINED}/{process.rank}", 1) > 1:
        todo = "Give every process another rank, and every job another port"
        store.set(_OUTCOME, f"two processes have rank {process.rank}. {todo}")
    elif store.add(_JOINED, 1) == process.world_size:
        store.set(_OUTCOME, "")
    wait = _watch_ranks if process.rank == 0 else _read_outcome
    outcome, reported_by_rank_0 = wait(store, process, timeout)
    if outcome:
        error = LaunchError(Problem(f"{process.host}:{process.port}", outcome))
        error.same_on_all_ranks = reported_by_rank_0
        raise error


@contextmanager
def ending_after(seconds: float, endpoint: str) -> Iterator[None]:
    """End this process if the ``with`` block, which waits for the store, takes much longer than ``seconds``.

    torch's client waits forever for a rank 0 that is stopped. A block that is not blocked raises before that.
    """
    timer = threading.Timer(seconds + _SECONDS_OF_GRACE, _end, [seconds, endpoint])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(seconds: float, endpoint: str) -> None:
    problem = Problem(endpoint, f"rank 0 has not answered for {seconds:g} s", CHECK_RANK_0)

    def say() -> None:
        if first_on_host(str(problem)):
            print(problem, file=sys.stderr, flush=True)
            time.sleep(_SECONDS_TO_READ)

    exit_now(EXIT_USER_ERROR, say)


def _watch_ranks(store: dist.Store, process: ProcessInfo, timeout: float) -> tuple[str, bool]:
    """Block on rank 0 until all ranks have joined.

    Returns:
        What is wrong if they have not joined within ``timeout`` seconds, and whether rank 0 reports it.
    """
    where, size = f"{process.host}:{process.port}", process.world_size
    deadline, warn_at = time.monotonic() + timeout, time.monotonic() + _SECONDS_BEFORE_WARNING
    while not store.check([_OUTCOME]):
        now = time.monotonic()
        if now >= deadline:
            outcome = _missing(store, size, timeout)
            store.set(_OUTCOME, outcome)
            time.sleep(_SECONDS_TO_READ)  # the store ends with this process
            return outcome, True
        if now >= warn_at:
            warn_at = deadline  # once
            get_logger().warning(f"waiting at {where}: {_count(store, size)}")
        time.sleep(min(0.05, deadline - now))
    return store.get(_OUTCOME).decode(), True


def _read_outcome(store: dist.Store, process: ProcessInfo, timeout: float) -> tuple[str, bool]:
    """Block until rank 0 has found that all ranks have joined, or what is wrong; return the same as rank 0.

    The server of the store is asked once, since thousands of ranks would overload it if they asked repeatedly.
    """
    # Rank 0 gives up first, so that all ranks report the same.
    limit = timeout + _SECONDS_TO_READ
    store.set_timeout(timedelta(seconds=limit))
    answer = _start(lambda: store.get(_OUTCOME))
    wait_for([answer], limit + _SECONDS_TO_READ)
    if not answer.done():
        return f"rank 0 has not answered for {limit:g} s. {_CHECK_RANKS}", False
    try:
        outcome = answer.result().decode()
        store.set_timeout(timedelta(seconds=timeout))
        return outcome, True
    except dist.DistNetworkError:
        return f"rank 0 ended before all ranks joined. {_CHECK_RANKS}", False
    except dist.DistStoreError:  # rank 0 itself has not joined
        return _missing(store, process.world_size, timeout), False


def _missing(store: dist.Store, size: int, timeout: float) -> str:
    """Return the error that ranks have not joined within ``timeout`` seconds."""
    return f"{_count(store, size, f' within {timeout:g} s')}. {_CHECK_RANKS}"


def _count(store: dist.Store, size: int, within: str = "") -> str:
    missing = [rank for rank in range(size) if not store.check([f"{_JOINED}/{rank}"])]
    return f"only {size - len(missing)} of {size} ranks joined{within}, without {format_ranks(missing)}"


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
            with without_cpp_logs():  # torch logs two stack traces for each failed attempt
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
    """Start to connect to a store."""
    timeout = timedelta(seconds=limit)
    return _start(lambda: dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))


def _start(function: Callable[[], T]) -> Future[T]:
    """Call ``function`` in a thread, which a server that never answers blocks until the process ends."""
    answer: Future[T] = Future()

    def call() -> None:
        try:
            answer.set_result(function())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return answer
