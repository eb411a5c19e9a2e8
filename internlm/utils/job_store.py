"""Client of the job's rendezvous store whose calls are bounded in time.

The client of torch blocks forever if the server accepts a request and never answers, as a stopped rank 0 does. Here, a
thread makes the calls, and the caller waits for at most some seconds.

This file must not import torch, see :mod:`internlm.utils.errors`.
"""

from __future__ import annotations

import hashlib
import queue
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotAnsweredError
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

#: Default limit of a call in seconds: a store that is alive answers within milliseconds.
ANSWER_SECONDS = 1.0
PREFIX = "internlm/"


class StoreError(Exception):
    """Error for a store that did not answer within the limit, or that cannot be reached."""

    def __init__(self, silent: bool) -> None:
        super().__init__("does not answer" if silent else "is gone")
        #: True if the store did not answer within the limit, False if its process is gone.
        self.silent = silent


class JobStore:
    """Client of a store, for any thread, with a connection and a thread of its own.

    Args:
        store: Store that the rest of the process uses. The client is a clone of it, so that a call that hangs does not
            lock the store for others.
    """

    def __init__(self, store: Store) -> None:
        self.source = store
        self._client: Store | None = None
        self._calls: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="job store")
        self._thread.start()

    def call(self, function: Callable[[Store], T], seconds: float = ANSWER_SECONDS) -> T:
        """Call ``function`` with the client in the other thread and return its result.

        Raises:
            StoreError: The call did not end within ``seconds``, or the store cannot be reached.
        """
        answer: Future[T] = Future()
        self._calls.put((function, answer))
        try:
            return answer.result(seconds)
        except NotAnsweredError:
            answer.cancel()
            raise StoreError(silent=True) from None
        except RuntimeError:  # torch.distributed.DistError is one
            raise StoreError(silent=False) from None

    def close(self) -> None:
        """End the thread, within :data:`ANSWER_SECONDS`.

        A thread within torch's C++ code would abort the process if it went on while the interpreter shuts down.
        """
        self._calls.put(None)
        self._thread.join(ANSWER_SECONDS)

    def _serve(self) -> None:
        from internlm.utils.torch_private import without_cpp_logs  # imports torch, which is loaded here

        while (call := self._calls.get()) is not None:
            function, answer = call
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                # torch logs a stack trace of C++ frames for each failure, which the caller handles.
                with without_cpp_logs():
                    answer.set_result(function(self._connected()))
            except Exception as error:
                answer.set_exception(error)

    def _connected(self) -> Store:
        if self._client is None:
            # torch's type stubs lack it.
            self._client = self.source.clone()  # type: ignore[attr-defined]
            self._client.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        return self._client


_current: JobStore | None = None


def loaded_distributed() -> ModuleType | None:
    """Return ``torch.distributed`` if it has been imported, else None, in which case no process group can exist."""
    return sys.modules.get("torch.distributed")


def job_store() -> JobStore | None:
    """Return the client of the store of the default process group; None if there is no process group."""
    global _current
    dist = loaded_distributed()
    if dist is None or not dist.is_initialized():
        return None
    from internlm.utils.torch_private import default_store  # imports torch, which is loaded here

    store = default_store()
    if _current is None or _current.source is not store:  # the process group has been replaced
        close_job_store()
        _current = JobStore(store)
    return _current


def close_job_store() -> None:
    """Close the client, if there is one."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def count_in_store(topic: str, increment: int = 0) -> int:
    """Add ``increment`` to the job-wide count of ``topic`` and return the new count.

    Without a process group, or if the store cannot be reached, return ``increment``.
    """
    store, key = job_store(), f"{PREFIX}count/{_digest(topic)}"
    try:
        return int(store.call(lambda client: client.add(key, increment))) if store else increment
    except StoreError:
        return increment


_held: list[socket.socket] = []


def first_on_host(topic: str) -> bool:
    """Return True in the first of the running processes of this host that calls this function with ``topic``.

    It takes the place of the store if this cannot be reached. The system releases the name when the process ends.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind(_local_name(topic))
    except OSError:
        holder.close()
        return not sys.platform.startswith("linux")
    _held.append(holder)
    return True


def has_first_on_host(topic: str) -> bool:
    """Return whether a running process of this host has called :func:`first_on_host` with ``topic``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_local_name(topic))
        except OSError:
            return False
    return True


def _local_name(topic: str) -> str:
    """Return the name of a socket without a file, which only Linux has."""
    return f"\0{PREFIX}{_digest(topic)}"


def _digest(topic: str) -> str:
    # A path that is not in UTF-8 has surrogates, which strict encoding refuses.
    return hashlib.sha256(topic.encode(errors="surrogatepass")).hexdigest()
