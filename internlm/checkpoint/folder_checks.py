"""Checks of a save folder at the start of a run, and plain messages for errors of the system."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.storage import Storage, partial_name
from internlm.utils.errors import CheckpointError, Problem, format_by_rank
from internlm.utils.logger import get_logger

#: Seconds in which a file must become visible on all hosts; clients of network file systems cache what is missing.
_VISIBLE_SECONDS = 10.0
#: Longest time in seconds after which rank 0 sends that an action for all ranks is not done.
_NEWS_SECONDS = 10.0
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
log = get_logger()
T = TypeVar("T")

#: Errors of the system in the words of users. Other errors keep the system's words.
_MESSAGES = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "larger than the limit for files (ulimit -f)",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "is not a folder, or is below a file",
    errno.EEXIST: "exists, and is not a folder",
    errno.EISDIR: "is a folder",
    errno.EIO: "the device failed to read or write (see the system's log)",
    errno.ESTALE: "the file server no longer has this file",
}

#: What to do about errors of an object store; :data:`STORE_TODO` about others.
_STORE_TODOS = {
    errno.EACCES: "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and what they may do there",
    errno.ENXIO: "Create the bucket, or check its name and AWS_ENDPOINT_URL",
    errno.ETIMEDOUT: "Check AWS_ENDPOINT_URL, and whether the store runs and can be reached from here",
    errno.ECONNRESET: "Check AWS_ENDPOINT_URL, and whether the store runs and can be reached from here",
    errno.EINVAL: "Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and AWS_PROFILE",
    errno.EPROTO: "Check whether AWS_ENDPOINT_URL begins with http:// or https://, and AWS_CA_BUNDLE",
    errno.EEXIST: "Choose another ckpt.save_ckpt_folder, or stop that run",
    errno.ENOSPC: "Free space in the store",
    errno.EDQUOT: "Free space in the store, or raise the quota",
}
STORE_TODO = "Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

#: What to do about an error of a local file that a change of its path or permissions does not solve.
_LOCAL_TODOS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space there, or choose another folder")

#: Errors of the way to a file, which say nothing about its content.
_NOT_OF_CONTENT = {
    errno.EACCES, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EMFILE, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ENFILE, errno.ENOMEM, errno.ENXIO, errno.EPERM, errno.EPROTO, errno.EREMOTEIO,
    errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


def is_damage(error: OSError) -> bool:
    """Return whether a file that cannot be read is damaged or missing, rather than out of reach at present."""
    return error.errno not in _NOT_OF_CONTENT


def reason_of(error: OSError) -> str:
    """Return the reason of a failed operation in plain words: ``no space left``."""
    reason = error.strerror or str(error)
    # Errors that this package raises have texts of their own.
    is_of_system = error.errno is not None and reason == os.strerror(error.errno)
    return _MESSAGES.get(error.errno or 0, reason) if is_of_system else reason


def explain(error: OSError) -> str:
    """Return the reason of a failed operation in plain words, with the file: ``/data/ckpts/x: no space left``."""
    return f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error)


def problem_of(error: OSError, storage: Storage, todo: str = "Choose a writable folder") -> Problem:
    """Return the problem of a failed operation of ``storage``; ``todo`` is the advice if it is a local folder."""
    where = str(error.filename or storage.location)
    return Problem(where, reason_of(error), todo_at(where, error.errno, todo))


def todo_at(where: str, number: int | None, local: str) -> str:
    """Return what to do about an error; ``local`` for most errors where ``where`` is not the address of an object."""
    if where.startswith("s3://"):
        return _STORE_TODOS.get(number or 0, STORE_TODO)
    return _LOCAL_TODOS.get(number or 0, local)


def on_first_rank(action: Callable[[], T], exchange: Exchange) -> T:
    """Return the result of ``action`` on rank 0, while the other ranks block; collective.

    It may take longer than the timeout of the exchange, as the wait for a lease does: rank 0 runs it in a thread, and
    sends from time to time that it is not done.

    Args:
        action: Function that rank 0 calls.
        exchange: Exchange between all ranks.

    Raises:
        CheckpointError: ``action`` has raised it. Raised on all ranks.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    is_first, news_seconds = dist.get_rank() == 0, min(exchange.timeout.total_seconds() / 4, _NEWS_SECONDS)
    if is_first:
        threading.Thread(target=run, name="save folder", daemon=True).start()
    while True:
        outcome: tuple[T | None, tuple[Problem, ...]] | None = None
        if is_first and wait([future], news_seconds).done:
            try:
                outcome = (future.result(), ())
            except CheckpointError as error:
                outcome = (None, error.problems)
            except Exception as error:  # the other ranks must not wait in vain
                log.exception("rank 0 cannot prepare the save folder")
                outcome = (None, (Problem("save folder", repr(error), "See the traceback of rank 0"),))
        outcome = exchange.broadcast(outcome)
        if outcome is not None:
            result, problems = outcome
            if problems:
                raise CheckpointError(*problems)
            return result  # type: ignore[return-value]  # the result of action


def check_space(storage: Storage, needed_bytes: int) -> None:
    """Check that there is space for ``needed_bytes``, as far as it is known. A quota is not.

    Raises:
        CheckpointError: There is not enough space.
    """
    free = storage.free_bytes()
    if free is not None and free < needed_bytes:
        message = f"need {format_size(needed_bytes)}, {format_size(free)} free at {storage.location}"
        raise CheckpointError(Problem("No space", message, "Free some, or choose another ckpt.save_ckpt_folder"))


def format_size(size: int) -> str:
    """Format bytes with one decimal: ``1.2 GB``."""
    factor, unit = next((row for row in _UNITS if size >= row[0]), _UNITS[-1])
    return f"{size / factor:.1f} {unit}"


def check_shared(storage: Storage, exchange: Exchange) -> None:
    """Check that all ranks see the same folder: a file that rank 0 writes there; collective.

    Args:
        storage: The save folder, which exists for rank 0.
        exchange: Exchange between all ranks.

    Raises:
        CheckpointError: Rank 0 cannot write, or ranks do not see its file. Raised on all ranks.
    """
    if dist.get_world_size() == 1:
        return
    # A later run removes it if this one is killed.
    name, token = partial_name("shared"), secrets.token_hex(8)
    is_first, failure = dist.get_rank() == 0, None
    if is_first:
        try:
            storage.write(name, token.encode())
        except OSError as error:
            failure = problem_of(error, storage)
    name, token, path, failure = exchange.broadcast((name, token, storage.path(name), failure))
    if failure:
        raise CheckpointError(failure)
    reason = "" if is_first else _why_unseen(storage, name, token)
    found = exchange.all_gather((socket.gethostname(), reason))
    if is_first:
        with suppress(OSError):
            storage.remove(name)
    if reasons := [(rank, reason) for rank, (_, reason) in enumerate(found) if reason]:
        by_rank = format_by_rank([f"not on host {host}" if reason else f"on host {host}" for host, reason in found])
        first, reason = reasons[0]
        message = f"not all ranks see what rank 0 writes there ({by_rank}; rank {first}: {reason})"
        raise CheckpointError(Problem(os.path.dirname(path), message, "Choose a folder that all hosts share"))


def _why_unseen(storage: Storage, name: str, token: str) -> str:
    """Return why this rank does not see the file; empty if it does."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:
            if storage.read(name, limit=len(token)) == token.encode():
                return ""
            reason = f"{storage.path(name)}: has another content"
        except OSError as error:
            reason = explain(error)
        if time.monotonic() > deadline:
            return reason
        time.sleep(0.2)
