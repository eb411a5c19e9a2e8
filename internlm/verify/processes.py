"""Local processes that form a process group, of gloo or NCCL, and run functions on request.

:func:`run_world` starts new processes for one call; ``internlm verify`` and the tests reuse processes for many calls.
All processes exit on :meth:`RankProcesses.close`, or when their parent exits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from internlm import accelerator
from internlm.accelerator import CPU, DEVICE_VARIABLE, kind_of
from internlm.core.context import global_context as gpc
from internlm.initialize.environment import device_index
from internlm.utils.errors import UserError
from internlm.utils.torch_private import COMPILER_MODULE

T = TypeVar("T")

HOST = "127.0.0.1"
SEED = 0
#: Modules that the fork server imports once for all ranks, since torch's compiler alone takes a second.
PRELOAD = [COMPILER_MODULE, "torch.distributed.checkpoint", "internlm.core.trainer_builder", "internlm.verify.run"]
#: Seconds to wait for further failures after the first: the rank with the root cause may be late to report it.
SETTLE = 0.5
#: Seconds to wait for hung ranks to write their stacks.
STACK_TIMEOUT = 2.0
#: Message to a rank, instead of a call: all ranks have answered.
LEAVE = b""


class RankError(Exception):
    """Error for a rank that raised an exception or died; the message contains the traceback of the first failure."""

    def __init__(self, message: str, user_error: UserError | None = None) -> None:
        super().__init__(message)
        self.user_error = user_error
        """The original error, if the user can fix it."""


class RankTimeoutError(RankError):
    """Error for ranks that did not finish in time; the message contains the stacks of all ranks."""


@dataclass(frozen=True)
class _Reply:
    result: Any = None
    error: str = ""
    user_error: UserError | None = None
    when: float = 0.0  # monotonic seconds, one clock for all processes; a rank that died counts as the first to fail


def run_world(
    world_size: int, function: Callable[..., T], args: Sequence[Any], timeout: float, device_type: str = CPU.name
) -> list[T]:
    """Call a function on every rank of a new process group.

    Args:
        world_size: Number of ranks.
        function: Module-level function, called as ``function(rank, world_size, *args)``.
        args: Further arguments. Arguments and results are pickled.
        timeout: Timeout in seconds. All processes have exited when the call returns or raises.
        device_type: Type of the devices on which the ranks compute, one device for each rank.

    Returns:
        Results by rank.

    Raises:
        UserError: A rank raised a UserError.
        RankError: A rank raised another exception, died, or did not finish in time.
    """
    ranks = RankProcesses(world_size, device_type=device_type)
    try:
        return ranks.run(function, args, timeout)
    except RankError as error:
        if error.user_error is not None:
            raise error.user_error from None
        raise
    finally:
        ranks.close()


class RankProcesses:
    """Processes of one process group, with a connection to each of them.

    The group has the default backend of the devices: gloo on the CPU, NCCL on GPUs. Each call starts clean: with the
    given environment, a fixed seed, no global context and a new default process group; all groups of the previous call
    are destroyed. After a failed call, the processes must be closed.
    """

    def __init__(
        self, world_size: int, environment: Mapping[str, str] | None = None, device_type: str = CPU.name
    ) -> None:
        context = _start_method(device_type)
        self.processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._stack_files = [Path(self._folder.name, f"rank-{rank}") for rank in range(world_size)]
        common = {**(os.environ if environment is None else environment)}
        try:
            for rank, stack_file in enumerate(self._stack_files):
                ours, theirs = context.Pipe()
                own = self._rank_environment(rank, world_size, device_type)
                args = (rank, world_size, common | own, theirs, stack_file)
                process = context.Process(target=_serve, args=args, name=f"rank-{rank}", daemon=True)
                process.start()
                theirs.close()  # so that the end of the process is the end of the connection
                self._connections.append(ours)
                self.processes.append(process)
        except BaseException:
            self.close()
            raise

    def _rank_environment(self, rank: int, world_size: int, device_type: str) -> dict[str, str]:
        """Return the environment variables of ``rank``: those of torchrun, the network interface and the device."""
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        numbers = {key: str(value) for key, value in {**ranks, "MASTER_PORT": self._store.port}.items()}
        return {**numbers, "MASTER_ADDR": HOST, "GLOO_SOCKET_IFNAME": "lo", DEVICE_VARIABLE: device_type}

    def run(self, function: Callable[..., T], args: Sequence[Any], timeout: float) -> list[T]:
        """Call ``function(rank, world_size, *args)`` on every rank and return the results by rank.

        Raises:
            RankError: A rank raised an exception, died, or did not finish within ``timeout`` seconds.
        """
        self.send(function, args)
        results = self._collect(timeout)
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the next call says who died meanwhile
                connection.send_bytes(LEAVE)
        return results

    def send(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """Start a call on every rank without receiving the results."""
        call = pickle.dumps((function, tuple(args)))
        for connection in self._connections:
            connection.send_bytes(call)

    def _collect(self, timeout: float) -> list[Any]:
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
        failed = {rank: reply for rank, reply in replies.items() if reply.error}
        if failed:
            first = min(failed, key=lambda rank: failed[rank].when)
            text = f"rank {first} of {len(self.processes)}:\n{failed[first].error.rstrip()}"
            raise RankError(text, failed[first].user_error)
        if waiting:
            hung = ", ".join(map(str, sorted(waiting.values())))
            noun = "rank" if len(waiting) == 1 else "ranks"
            text = f"{noun} {hung} of {len(self.processes)}: did not finish within {timeout:g} s"
            raise RankTimeoutError(f"{text}\n{self._stacks()}")
        return [replies[rank].result for rank in sorted(replies)]

    def _receive(self, rank: int, connection: Connection) -> _Reply:
        try:
            reply: _Reply = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self.processes[rank]
            process.join()
            return _Reply(error=f"died with exit code {process.exitcode}\n{self._stack_files[rank].read_text()}")
        return reply

    def _stacks(self) -> str:
        """Return the Python stacks of all threads of every rank that is still running."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGQUIT)
        deadline = time.monotonic() + STACK_TIMEOUT
        while time.monotonic() < deadline and not all(file.stat().st_size for file in self._stack_files):
            time.sleep(0.02)
        time.sleep(0.1)  # let the last rank finish writing
        return "\n".join(f"--- rank {rank}\n{file.read_text()}" for rank, file in enumerate(self._stack_files))

    def close(self) -> None:
        """Kill all processes and wait until they have exited."""
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._folder.cleanup()


def _start_method(device_type: str) -> ForkServerContext | SpawnContext:
    # An accelerator cannot be used in a process that was forked after the driver was called, as an import may do.
    if not kind_of(device_type).is_host:
        return multiprocessing.get_context("spawn")
    # Fork from a server that has imported torch: the import takes seconds per process. This process itself must not be
    # forked: a child would inherit the locks of its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


# -- a rank
def _serve(rank: int, world_size: int, environment: dict[str, str], connection: Connection, stack_file: Path) -> None:
    """Run calls until the parent closes the connection or exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its ranks
    stacks = stack_file.open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGQUIT, stacks)
    # A rank within a call does not read its connection, so a thread watches for the exit of the parent.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, int(environment["MASTER_PORT"]), is_master=False)
    for call_index in itertools.count():
        try:
            while (call := connection.recv_bytes()) == LEAVE:
                _leave_groups()
                gc.collect()  # a model and its hooks refer to each other, and to groups
            if not gc.get_freeze_count():
                gc.freeze()  # what was imported stays: a collection need not look at it
        except EOFError:
            return
        connection.send_bytes(_answer(call, rank, world_size, environment, dist.PrefixStore(str(call_index), store)))


def _answer(call: bytes, rank: int, world_size: int, environment: dict[str, str], store: dist.Store) -> bytes:
    try:
        _start_clean(rank, world_size, store, environment)
        function, args = pickle.loads(call)
        return pickle.dumps(_Reply(function(rank, world_size, *args)))
    except BaseException as error:
        user_error = error if isinstance(error, UserError) else None
        return pickle.dumps(_Reply(error=traceback.format_exc(), user_error=user_error, when=time.monotonic()))


def _start_clean(rank: int, world_size: int, store: dist.Store, environment: dict[str, str]) -> None:
    """Set the environment, the seed and the device of a call, and create its default group."""
    _leave_groups()
    os.environ.clear()
    os.environ.update(environment)
    torch.manual_seed(SEED)
    # Before the group: NCCL connects the devices that are current when a group is first used.
    accelerator.set_device(device_index(rank, accelerator.device_count()))
    dist.init_process_group(accelerator.default_backend(), store=store, rank=rank, world_size=world_size)


def _leave_groups() -> None:
    """Destroy the global context and the process groups of the previous call.

    This is done when all ranks have answered, because a group must not be closed while a slower rank reads from it; and
    not as late as before the next call, because each group of gloo has a thread that polls 100 times a second.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gpc.destroy()  # which keeps its groups while there is a default group


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
