"""Lease of a save folder: a file that names the one run which may save there.

The owner renews it in a thread, and again before every commit. Another run takes it over if the owner's process is
dead, or if nobody has renewed it for longer than its time to live. That changes its token, so that an owner who was
stopped for so long finds out before it commits.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from internlm.checkpoint.folder_checks import explain, problem_of
from internlm.checkpoint.storage import COMPARED_BYTES, Storage
from internlm.utils.errors import CheckpointError, Problem
from internlm.utils.logger import get_logger

log = get_logger()
LEASE_FILE = "lease.json"
TODO = "Choose another ckpt.save_ckpt_folder, or stop that run"
_LONGEST_TEXT = 200


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """Times of a lease in seconds."""

    to_live: float = 60.0
    renewal: float = 5.0
    #: How long a lease is watched before it is refused or taken over; longer than a renewal takes to be seen. The old
    #: processes of a job that is restarted end within this time.
    watch: float = 8.0
    poll: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Content of the lease: who holds it."""

    host: str
    boot_id: str
    pid: int
    pid_namespace: str
    """Processes of two containers on one host may have the same pid."""
    process_start: str
    """Start of the process in ticks since boot: a later process may get the same pid."""
    job: str
    token: str
    renewed: int = 0
    """Number of renewals. The time of the last one is that of the file, by the clock of the storage."""

    def __str__(self) -> str:
        return f'host {self.host}, pid {self.pid}, job "{self.job}"'

    def is_this_process(self) -> bool:
        """Return whether this process is the owner, perhaps by an object that was abandoned."""
        return replace(this_owner(self.job), token=self.token, renewed=self.renewed) == self

    def is_dead(self) -> bool:
        """Return whether the owner was a process of this host that has ended; False if that is unknown."""
        here = this_owner("")
        if not self.boot_id or (self.boot_id, self.pid_namespace) != (here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # a process of another user
            return False
        state, start = _process(self.pid)
        # A zombie has ended, and waits for its parent.
        return state in ("Z", "X") or bool(start and start != self.process_start)


def this_owner(job: str) -> Owner:
    """Return this process as an owner, with a new token."""
    return Owner(
        host=_printable(socket.gethostname()),
        boot_id=_read_line("/proc/sys/kernel/random/boot_id"),
        pid=os.getpid(),
        pid_namespace=_read_link("/proc/self/ns/pid"),
        process_start=_process(os.getpid())[1],
        job=_printable(job),
        token=secrets.token_hex(8),
    )


def this_launcher() -> str:
    """Return which process has started this rank, and may start it again; empty if it is no launcher of ranks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    here, launcher = this_owner(""), os.getppid()
    return f"{here.boot_id}/{here.pid_namespace}/{launcher}/{_process(launcher)[1]}"


def is_restart() -> bool:
    """Return whether the launcher has started the ranks again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def parse_owner(content: bytes) -> Owner | None:
    """Return the owner that a lease names, or None if it is damaged."""
    try:
        values = json.loads(content)
        owner = Owner(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    types = {field.name: {"str": str, "int": int}[str(field.type)] for field in fields(Owner)}
    if any(type(values.get(name, 0)) is not kind for name, kind in types.items()) or owner.pid <= 0:
        return None
    return replace(owner, host=_printable(owner.host), job=_printable(owner.job))


class Lease:
    """Lease that this process holds until :meth:`release`, or until it is lost. See :meth:`acquire`."""

    def __init__(
        self, storage: Storage, owner: Owner, on_lost: Callable[[str], None] | None, times: LeaseTimes
    ) -> None:
        self.storage, self.times, self.on_lost = storage, times, on_lost
        self._owner, self._content = owner, to_bytes(owner)
        self._lost = ""
        self._is_told = self._is_failing = False
        self._released = False
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        # Weak references: a lease that nobody uses any more is not renewed.
        args = (weakref.ref(self), self._stop, times.renewal)
        self._thread = threading.Thread(target=_keep, args=args, name="lease", daemon=True)

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        job: str,
        on_lost: Callable[[str], None] | None = None,
        times: LeaseTimes | None = None,
    ) -> Lease:
        """Become the owner of a save folder; one process of a job does so, usually rank 0.

        The lease is renewed as long as the result is referenced, and released at the end of the process.

        Args:
            storage: The save folder, which exists.
            job: Name of the job, for messages.
            on_lost: Function called once, in a thread, with the reason if the lease is lost.
            times: Times, if not the usual ones.

        Raises:
            CheckpointError: A live run owns the folder, or it cannot be written to.
        """
        times = times or LeaseTimes()
        owner = this_owner(job)
        try:
            _wait_and_take(storage, owner, times)
        except OSError as error:
            raise CheckpointError(problem_of(error, storage)) from None
        lease = cls(storage, owner, on_lost, times)
        lease._thread.start()
        # If the run fails on the way, the next one need not wait.
        atexit.register(_release_at_exit, weakref.ref(lease))
        return lease

    @property
    def lost(self) -> str:
        """Why the lease was lost; empty while this process holds it."""
        return self._lost

    def check(self) -> None:
        """Renew the lease; call it before each commit. Afterwards no other run takes it over for its time to live.

        Raises:
            CheckpointError: The lease was lost, or the storage cannot be reached.
        """
        try:
            with self._mutex:
                self._renew()
        except OSError as error:
            where = self.storage.path(LEASE_FILE)
            raise CheckpointError(Problem(where, f"cannot be renewed ({explain(error)})")) from None
        if self._lost:
            self._tell_loss()
            raise CheckpointError(Problem(self.storage.location, self._lost, TODO))

    def release(self) -> None:
        """Give the lease up, if this process still holds it. Calling it again does nothing."""
        if self._released or os.getpid() != self._owner.pid:  # a fork of the owner is not the owner
            return
        self._released = True
        self._stop.set()
        with self._mutex:
            if not self._lost:
                try:
                    self.storage.compare_and_swap(LEASE_FILE, self._content, None)
                except (OSError, RuntimeError) as error:  # RuntimeError: the interpreter is about to end
                    log.warning(f"{self.storage.path(LEASE_FILE)}: cannot be released ({error})")

    def _renew_in_background(self) -> None:
        with self._mutex:
            if self._released:
                return
            try:
                self._renew()
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    log.warning(f"{self.storage.path(LEASE_FILE)}: cannot be renewed ({explain(error)})")
                # This is no loss: a run that has taken the folder over is found out by the next renewal.
                self._is_failing = True
        self._tell_loss()

    def _renew(self) -> None:
        if self._lost:
            return
        renewed = replace(self._owner, renewed=self._owner.renewed + 1)
        content = to_bytes(renewed)
        if self.storage.compare_and_swap(LEASE_FILE, self._content, content):
            self._owner, self._content = renewed, content
            return
        found = _read(self.storage)
        if found == content:  # written by a request whose answer was lost
            self._owner, self._content = renewed, content
            return
        other = parse_owner(found or b"")
        self._lost = f"another run took it over ({other})" if other else "its lease was deleted or damaged"

    def _tell_loss(self) -> None:
        """Log a loss and call back, once, and without the mutex: the callback may call any method."""
        with self._mutex:
            is_news, self._is_told = bool(self._lost) and not self._is_told, self._is_told or bool(self._lost)
        if is_news:
            log.error(f"{self.storage.location}: {self._lost}")
            if self.on_lost is not None:
                self.on_lost(self._lost)


def _keep(reference: weakref.ref[Lease], stop: threading.Event, seconds: float) -> None:
    """Renew a lease until it is released, lost or garbage."""
    while not stop.wait(seconds):
        lease = reference()
        if lease is None or lease.lost:
            return
        lease._renew_in_background()
        del lease


def _release_at_exit(reference: weakref.ref[Lease]) -> None:
    if lease := reference():
        lease.release()


def to_bytes(owner: Owner) -> bytes:
    """Return the content of a lease."""
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def _wait_and_take(storage: Storage, owner: Owner, times: LeaseTimes) -> None:
    """Take the lease as soon as there is none, or the present one is stale.

    Raises:
        CheckpointError: The present one is renewed while it is watched.
    """
    begin = since = _now()
    watched = None
    told = False
    while True:
        content = _read(storage)
        if not content:
            if storage.compare_and_swap(LEASE_FILE, content, to_bytes(owner)):
                return
            continue
        if content != watched:
            since, was_renewed, watched = _now(), watched is not None, content
            if was_renewed and since - begin > times.watch:
                raise _owned(storage, content)
        reason = _why_stale(storage, content, _now() - since, times)
        if reason:
            if storage.compare_and_swap(LEASE_FILE, content, to_bytes(owner)):
                log.warning(
                    f"{storage.location}: took over the lease of {parse_owner(content) or 'another run'}: {reason}"
                )
                return
            continue
        if not told and _now() - begin > 1:
            told = True
            log.info(
                f"{storage.location}: waiting up to {times.to_live:.0f} s for the lease of {_named(content)} to expire"
            )
        time.sleep(times.poll)


def _why_stale(storage: Storage, content: bytes, unchanged: float, times: LeaseTimes) -> str:
    """Return why the owner need not be waited for any longer; empty if it may be alive."""
    owner = parse_owner(content)
    if owner and owner.is_dead():
        return "its process is dead"
    if owner and owner.is_this_process():
        return "it is an earlier one of this process"
    # The file's time alone is not enough: clocks may be wrong, and a copy of the file has the time of the copy.
    if unchanged > times.to_live:
        return f"not renewed for {unchanged:.0f} s"
    if unchanged > times.watch:
        with suppress(FileNotFoundError):
            age = storage.age(LEASE_FILE)
            return f"not renewed for {age:.0f} s" if age > times.to_live else ""
    return ""


def _owned(storage: Storage, content: bytes) -> CheckpointError:
    renewed = "just now"
    with suppress(OSError):
        renewed = f"{max(storage.age(LEASE_FILE), 0):.0f} s ago"
    message = f"owned by a live run ({_named(content)}, renewed {renewed})"
    return CheckpointError(Problem(storage.location, message, TODO))


def _named(content: bytes) -> str:
    return str(parse_owner(content) or "another run")


def _read(storage: Storage) -> bytes | None:
    """Return the beginning of the lease, as much as is compared; None if there is none."""
    try:
        return storage.read(LEASE_FILE, COMPARED_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
    source = storage.open(LEASE_FILE)
    try:
        content = bytearray(COMPARED_BYTES)
        return bytes(content[: source.read_into(0, memoryview(content))])
    finally:
        source.close()


def _now() -> float:
    """Return the seconds since boot, including those in which the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _process(pid: int) -> tuple[str, str]:
    """Return the state and the start of a process; empty texts if they are unknown."""
    # The name, in parentheses, may contain anything.
    values = _read_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (values[0], values[19]) if len(values) > 19 else ("", "")


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _printable(text: str) -> str:
    """Return a text that is safe in a log: a lease may have been written by anybody."""
    return "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_TEXT])
