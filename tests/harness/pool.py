"""Ranks for tests: real gloo processes that stay up for the whole test session.

Starting Python and importing torch takes seconds, a test on four ranks takes milliseconds. So a pool of worker
processes per world size is forked once from a server that has torch loaded, and a test ships a function to it:
:func:`run_ranks`.

Each call starts clean: the environment, torch's random numbers, the global context, and a process group made anew,
which also ends every group of the call before. A pool in which anything went wrong is killed, and the next call
starts another.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

HOST = "127.0.0.1"
SEED = 0
#: The second is what an optimizer imports when it is made.
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.checkpoint", "internlm.core.trainer_builder"]
#: Seconds in which the cause of a failure may still arrive after its consequences on other ranks.
SETTLE = 0.2
#: Seconds in which a hung rank writes down its stack.
STACK_TIMEOUT = 2.0

#: What every call starts from: the environment of the test session before any test changed it.
_ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": HOST}


class RankError(Exception):
    """A rank raised or died; the text holds the traceback of the rank that failed first."""


class RankTimeoutError(Exception):
    """Some ranks did not finish in time; the text holds the stacks of all."""


@dataclass(frozen=True)
class _Reply:
    result: Any = None
    error: str | None = None
    when: float = 0.0  # monotonic seconds, one clock for all processes; a rank that died counts as the first to fail


# -- worker


def _serve(rank: int, world_size: int, environment: dict[str, str], connection: Connection, stack_file: Path) -> None:
    """A worker's life: answer calls until the test session ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test session, which then ends its workers
    stacks = stack_file.open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, int(environment["MASTER_PORT"]), is_master=False)
    for number in itertools.count():
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            _start_clean(rank, world_size, dist.PrefixStore(str(number), store), environment)
            function, args = pickle.loads(call)
            answer = pickle.dumps(_Reply(function(rank, world_size, *args)))
        except BaseException:
            answer = pickle.dumps(_Reply(error=traceback.format_exc(), when=time.monotonic()))
        connection.send_bytes(answer)


def _start_clean(rank: int, world_size: int, store: dist.Store, environment: dict[str, str]) -> None:
    """End what the last call left, and make a new default group.

    Done before a call and not after one: a group must not be closed while a slower rank still reads from it.
    """
    context = sys.modules.get("internlm.core.context")
    if context is not None:
        context.global_context.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)
    torch.manual_seed(SEED)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


# -- test session


class Pool:
    """The workers of one world size."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._stack_files = [Path(self._folder.name, f"rank-{rank}") for rank in range(world_size)]
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank, stack_file in enumerate(self._stack_files):
            ours, theirs = context.Pipe()
            args = (rank, world_size, self._environment(rank, world_size), theirs, stack_file)
            process = context.Process(target=_serve, args=args, name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def _environment(self, rank: int, world_size: int) -> dict[str, str]:
        """What torchrun would have set."""
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        numbers = {**ranks, "MASTER_PORT": self._store.port}
        return _ENVIRONMENT | {key: str(value) for key, value in numbers.items()}

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., T], args: tuple[Any, ...], timeout: float) -> list[T]:
        """See :func:`run_ranks`. After an error the pool must be closed."""
        call = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(call)
        replies: dict[int, _Reply] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                replies[rank] = self._receive(rank, connection)
                if replies[rank].error:
                    deadline = min(deadline, time.monotonic() + SETTLE)
        failures = {rank: reply for rank, reply in replies.items() if reply.error}
        if failures:
            first = min(failures, key=lambda rank: failures[rank].when)
            raise RankError(f"rank {first} of {len(self._processes)}:\n{failures[first].error}")
        if waiting:
            raise RankTimeoutError(
                f"ranks {sorted(waiting.values())} not finished after {timeout:g} s\n{self._stacks()}"
            )
        return [replies[rank].result for rank in sorted(replies)]

    def _receive(self, rank: int, connection: Connection) -> _Reply:
        try:
            return pickle.loads(connection.recv_bytes())
        except EOFError:
            process = self._processes[rank]
            process.join()
            stack = self._stack_files[rank].read_text()
            return _Reply(error=f"died with exit code {process.exitcode}\n{stack}")

    def _stacks(self) -> str:
        """The Python stack of every thread of every rank; a rank that can't write it down is left without."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_TIMEOUT
        while time.monotonic() < deadline and not all(file.stat().st_size for file in self._stack_files):
            time.sleep(0.02)
        time.sleep(0.1)  # for the rest of the last one
        return "\n".join(f"--- rank {rank}\n{file.read_text()}" for rank, file in enumerate(self._stack_files))

    def close(self) -> None:
        """Kill the workers, whatever they do, and wait until they are gone."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._folder.cleanup()


_pools: dict[int, Pool] = {}


def run_ranks(world_size: int, function: Callable[..., T], *args: Any, timeout: float = 60) -> list[T]:
    """Call ``function(rank, world_size, *args)`` on every rank of a gloo group; return the results by rank.

    ``function`` is module-level: it travels by name, its arguments and result by pickle. ``timeout`` is in seconds.
    Raises :class:`RankError` if a rank raises or dies, :class:`RankTimeoutError` if one doesn't finish; then all ranks
    of the pool are killed.
    """
    pool = _pools.get(world_size) or _pools.setdefault(world_size, Pool(world_size))
    try:
        return pool.run(function, args, timeout)
    except BaseException:
        _pools.pop(world_size).close()
        raise


def pids(world_size: int) -> list[int]:
    """Process ids of the workers that serve ``world_size``, by rank; empty where none are up."""
    return _pools[world_size].pids if world_size in _pools else []


def close_pools() -> None:
    """End all workers."""
    while _pools:
        _pools.popitem()[1].close()
