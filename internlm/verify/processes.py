"""Ranks on this machine: gloo processes over the loopback, ended whatever happens."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from internlm.accelerator.device import DEVICE_VARIABLE
from internlm.utils.errors import UserError
from internlm.utils.torch_private import COMPILER_MODULE

T = TypeVar("T")

HOST = "127.0.0.1"
PRELOAD = [COMPILER_MODULE, "internlm.verify.run"]
#: Seconds in which the cause of a failure may still arrive after its consequences on other ranks.
SETTLE = 0.5
#: Seconds in which hung ranks may write down their stacks.
LAST_WORDS = 0.5


class RankError(Exception):
    """A rank raised, died or hung."""


@dataclass(frozen=True)
class _Reply:
    result: Any = None
    error: str = ""
    user_error: UserError | None = None
    when: float = 0.0  # monotonic seconds, one clock for all processes; a rank that died counts as the first to fail


def run_world(world_size: int, function: Callable[..., T], args: Sequence[Any], timeout: float) -> list[T]:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` new CPU processes, which a gloo group joins; the
    results by rank. ``function`` travels by name, its arguments and result by pickle; ``timeout`` is in seconds.

    Raises the :class:`UserError` of a rank that met one, and :class:`RankError` with the traceback of the rank that
    failed first, or the names of those that hang. No process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    processes: list[Any] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            call = (rank, world_size, store.port, theirs, function, tuple(args))
            processes.append(context.Process(target=_serve, args=call, name=f"rank-{rank}", daemon=True))
            connections.append(ours)
            processes[-1].start()
            theirs.close()
        return _collect(processes, connections, timeout)
    finally:
        _end(processes, connections)


# -- this process
def _collect(processes: Sequence[Any], connections: Sequence[Connection], timeout: float) -> list[Any]:
    replies: dict[int, _Reply] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    deadline = time.monotonic() + timeout
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            replies[rank] = _receive(processes[rank], connection)
            if replies[rank].error:
                deadline = min(deadline, time.monotonic() + SETTLE)
    failed = {rank: reply for rank, reply in replies.items() if reply.error}
    if failed:
        raise _first_error(failed, len(processes))
    if waiting:
        _ask_for_stacks([processes[rank] for rank in waiting.values()])
        names = ", ".join(map(str, sorted(waiting.values())))
        raise RankError(f"not finished after {timeout:g} s: rank {names} of {len(processes)}; where they hang is above")
    return [replies[rank].result for rank in sorted(replies)]


def _receive(process: Any, connection: Connection) -> _Reply:
    try:
        reply: _Reply = pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join()
        return _Reply(error=f"died with exit code {process.exitcode}\n")
    return reply


def _first_error(failed: dict[int, _Reply], world_size: int) -> Exception:
    first = min(failed, key=lambda rank: failed[rank].when)
    return failed[first].user_error or RankError(f"rank {first} of {world_size}:\n{failed[first].error.rstrip()}")


def _ask_for_stacks(processes: Sequence[Any]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(LAST_WORDS)


def _end(processes: Sequence[Any], connections: Sequence[Connection]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join()
    for connection in connections:
        connection.close()


# -- a rank
def _serve(
    rank: int, world_size: int, port: int, connection: Connection, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    """A rank's life. Having answered it waits for its end: its group must not go while a slower rank reads from it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=False)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        _join(rank, world_size, port)
        reply = _Reply(function(rank, world_size, *args))
    except UserError as error:
        reply = _Reply(error=str(error), user_error=error, when=time.monotonic())
    except BaseException:
        reply = _Reply(error=traceback.format_exc(), when=time.monotonic())
    connection.send_bytes(pickle.dumps(reply))
    signal.pause()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _join(rank: int, world_size: int, port: int) -> None:
    """Make the default group; what torchrun would have put into the environment is there too."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in {**ranks, "MASTER_PORT": port}.items()})
    os.environ.update({"MASTER_ADDR": HOST, "GLOO_SOCKET_IFNAME": "lo", DEVICE_VARIABLE: "cpu"})
    store = dist.TCPStore(HOST, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
