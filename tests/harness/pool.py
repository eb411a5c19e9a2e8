"""Ranks for tests: the processes of :mod:`internlm.verify.processes`, kept for the whole test session.

Starting a process takes tenths of a second, a test on four ranks takes milliseconds. So the ranks of each world size
are started when a test first asks for them. Those in which anything went wrong are killed, and the next call starts
others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from internlm.accelerator import CPU
from internlm.verify.processes import RankProcesses

T = TypeVar("T")

#: What every call starts from: the environment of the test session before any test changed it.
ENVIRONMENT = dict(os.environ)

_pools: dict[tuple[int, str], RankProcesses] = {}


def run_ranks(
    world_size: int, function: Callable[..., T], *args: Any, timeout: float = 60, device_type: str = CPU.name
) -> list[T]:
    """Call ``function(rank, world_size, *args)`` on every rank of a process group; return the results by rank.

    ``function`` is module-level: it travels by name, its arguments and result by pickle. ``timeout`` is in seconds.
    Raises :class:`RankError` if a rank raises or dies, :class:`RankTimeoutError` if one doesn't finish; then all ranks
    of the pool are killed.
    """
    key = world_size, device_type
    pool = _pools.get(key) or _pools.setdefault(key, RankProcesses(world_size, ENVIRONMENT, device_type))
    try:
        return pool.run(function, args, timeout)
    except BaseException:
        _pools.pop(key).close()
        raise


def pids(world_size: int) -> list[int]:
    """Return the process ids of the CPU ranks that serve ``world_size``, in order; empty where none are up."""
    pool = _pools.get((world_size, CPU.name))
    return [process.pid or 0 for process in pool.processes] if pool else []


def close_pools() -> None:
    """End all ranks."""
    while _pools:
        _pools.popitem()[1].close()
