"""Progress of each rank: the step and the phase in which it is, published in the job's store by a thread.

Setting the phase costs a fraction of a microsecond. The thread publishes it as a *beacon*, together with a count that
shows that the process is running (:mod:`internlm.utils.lost_ranks` reads the beacons when a rank waits in vain).

The thread also ends a process that would block: one that has failed, or whose job has failed, but that does not end,
and one whose rendezvous store has not answered for longer than the timeout of the process groups.

This file must not import torch, see :mod:`internlm.utils.errors`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from internlm.utils.job_store import PREFIX, JobStore, StoreError, has_first_on_host

if TYPE_CHECKING:
    from torch.distributed import Store

#: Phases in the order in which a step passes through them; other phases come last.
PHASES = ("start", "loading", "data wait", "forward", "backward", "update", "hooks", "evaluation", "save", "end")
#: Seconds between two beacons of a rank, in a job of up to :data:`RANKS_PER_SECOND` ranks.
SECONDS = 1.0
#: Beacons that the store receives in a second, at most.
RANKS_PER_SECOND = 1000
#: Seconds that a process has to end after it has failed.
EXIT_SECONDS = 5.0
#: The same for a process that has looked for a lost rank, which takes a part of these seconds.
_EXIT_SECONDS_AFTER_SEARCH = 1.0
#: Seconds in which a process that is ended prints what it has to say.
_LAST_SECONDS = 3.0
#: Key in the store for why the job ends, once a rank has failed or has found a lost one.
OVER = f"{PREFIX}over"
_PACKAGE = str(Path(__file__).parents[1])


# -- the phase of this process ----------------------------------------------------------------------------------------
@dataclass
class _Progress:
    #: Phase, step, and the time when the phase began.
    now: tuple[str, int, float] = field(default_factory=lambda: ("start", 0, time.time()))
    #: Whether this rank has waited in vain for another.
    waited_in_vain: bool = False
    #: Exit code of a process that has failed, None while it has not.
    exit_code: int | None = None
    #: Whether this process ends without a failure.
    ended: bool = False


_own = _Progress()


def enter_phase(phase: str, step: int | None = None) -> None:
    """Set the phase of this process, one of :data:`PHASES`, and its step, counted from 0; None: the same step."""
    _own.now = (phase, _own.now[1] if step is None else step, time.time())


@contextmanager
def in_phase(phase: str, step: int | None = None) -> Iterator[None]:
    """Set the phase in the ``with`` block, and return to the previous one unless the block raises."""
    previous = _own.now
    enter_phase(phase, step)
    yield
    # Not after an exception: whoever reports it wants the phase in which it was raised.
    enter_phase(*previous[:2])


def own_phase() -> str:
    """Return the phase and the step of this process, such as ``"backward of step 17"``."""
    return format_phase(*_own.now[:2])


def format_phase(phase: str, step: int) -> str:
    """Format a phase with its step, if the phase is part of one."""
    return phase if phase in ("start", "loading", "end") else f"{phase} of step {step}"


def note_vain_wait() -> None:
    """Note that this rank has waited in vain for another."""
    _own.waited_in_vain = True


def exit_code_after_lost_peer() -> int | None:
    """Return the exit code of a process that fails since it has waited in vain, whose process groups would block."""
    return _own.exit_code if _own.waited_in_vain else None


def note_end() -> None:
    """Note that this process ends; without a failure, unless one was noted before."""
    _own.ended = _own.exit_code is None


def is_failing() -> bool:
    """Return whether this process has failed, or looks for the rank that is lost: it ends within seconds."""
    return _own.waited_in_vain or _own.exit_code is not None


def restart() -> None:
    """Forget what an earlier run of this process has noted."""
    global _own
    _own = _Progress()


def end_within_limit(exit_code: int) -> None:
    """Note that this process has failed: if it does not end soon after its main thread, it is ended with ``exit_code``.

    In a job of several ranks, threads of a process group may block until its timeout.
    """
    _own.exit_code = exit_code


# -- the launcher -----------------------------------------------------------------------------------------------------
#: Process that started this one, noted as early as possible: if it has died before, the one that adopts this process.
_parent = os.getppid()


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_note_parent)


def launcher_has_died() -> bool:
    """Return whether this rank's launcher has died, by SIGKILL: otherwise it would have ended its ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _parent


# -- beacons ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Beacon:
    """State of a rank, as it published it last; its times are by the clock of rank 0's host, to within an interval."""

    count: int  # grows by 1 with each beacon
    phase: str
    step: int
    since: float  # time at which the phase began
    time: float  # time of the beacon
    code: str  # file and line of the package's code that the main thread runs
    waiting: bool  # whether the main thread waits for another rank
    host: str
    pid: int
    started: str  # start time of the process, which tells it from a later one with this pid
    dumps_stack: bool  # whether the process writes its stack to stderr on SIGUSR2
    ended: bool  # whether the process ends without a failure, so that nobody waits for it

    @classmethod
    def read(cls, text: bytes) -> Beacon:
        """Return the beacon that :meth:`write` wrote."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """Return the beacon as text."""
        return json.dumps(asdict(self))


def beacon_key(rank: int) -> str:
    """Return the key of a rank's beacon in the job's store."""
    return f"{PREFIX}beacon/{rank}"


def interval(world_size: int) -> float:
    """Return the seconds between two beacons of a rank."""
    return max(SECONDS, world_size / RANKS_PER_SECOND)


def own_beacon(count: int, ahead: float = 0.0) -> Beacon:
    """Return the beacon of this process.

    Args:
        count: Number of beacons so far.
        ahead: Seconds by which the clock of this host is ahead of that of rank 0's.
    """
    phase, step, since = _own.now
    code, waiting = _position(sys._current_frames().get(threading.main_thread().ident or 0))
    return Beacon(
        count=count,
        phase=phase,
        step=step,
        since=since - ahead,
        time=time.time() - ahead,
        code=code,
        waiting=waiting or _own.waited_in_vain,
        host=own_host(),
        pid=os.getpid(),
        started=start_time(os.getpid()),
        dumps_stack=_dumps_stack,
        ended=_own.ended,
    )


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost position of a stack within the package, and whether its code waits for another rank."""
    inner, files = frame, []
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    if frame is None:
        return "", any("/torch/distributed/" in file for file in files)
    # Waits for a collective or a message are in methods of this name, and all others in torch's Python code.
    waits = frame is inner and frame.f_code.co_name in ("wait", "_wait")
    path = Path(frame.f_code.co_filename).relative_to(Path(_PACKAGE).parent)
    return f"{path}:{frame.f_lineno}", waits or any("/torch/distributed/" in file for file in files)


def own_host() -> str:
    """Return the name of this host and of its namespace of pids: pids are comparable only within the same one."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # another system than Linux
        return socket.gethostname()


def start_time(pid: int) -> str:
    """Return the start time of a process of this host, or an empty string if there is no such process."""
    try:
        # The name of the command, in parentheses, may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended


_dumps_stack = False


def dump_stack_on_signal() -> None:
    """Write the Python stacks of all threads to stderr when this process receives SIGUSR2.

    A handler of the user is kept.
    """
    global _dumps_stack
    if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        _dumps_stack = True


# -- the thread -------------------------------------------------------------------------------------------------------
class BeaconThread(threading.Thread):
    """Thread that publishes the beacon of this rank, and ends the process where it would block forever.

    Args:
        store: Client of the job's store.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout: Timeout of the process groups in seconds.
        end: Function that ends the process because the store has been silent for longer than ``timeout``, or because
            the job is over but the main thread has not ended.
        watch: Function that is called after each beacon, until the job is over; None: nothing is called.
    """

    def __init__(
        self,
        store: JobStore,
        rank: int,
        world_size: int,
        timeout: float,
        end: Callable[[BeaconThread], None],
        watch: Callable[[BeaconThread], None] | None = None,
    ) -> None:
        super().__init__(daemon=True, name="beacons")
        self.watch = watch
        self.store, self.rank, self.world_size = store, rank, world_size
        self.interval, self.timeout, self.end = interval(world_size), timeout, end
        self.stopped = False
        #: Last beacon of rank 0, whose process may hold the store: when it is lost, its beacon is lost as well.
        self.of_first_rank: Beacon | None = None
        #: Value of :data:`OVER`, once a rank has set it.
        self.over = b""
        #: Whether another process of this host has reported that the store is lost.
        self.is_reported = False
        #: Error of the last beacon.
        self.store_error: StoreError | None = None
        #: Seconds by which the clock of this host is ahead of that of rank 0's.
        self._ahead = 0.0
        self._count, self._answered, self._over_since = 0, time.monotonic(), 0.0

    @property
    def silent_for(self) -> float:
        """Seconds since the last answer of the store."""
        return time.monotonic() - self._answered

    def now(self) -> float:
        """Return the time by the clock of rank 0's host, as in beacons."""
        return time.time() - self._ahead

    def run(self) -> None:
        """Publish a beacon every few seconds until the main thread ends or :attr:`stopped` is set."""
        main = threading.main_thread()
        while not self.stopped:
            self.publish()
            if self.store_error is not None and self.silent_for > self._patience(self.store_error):
                self.end(self)
            if self.watch is not None and not self.over:
                self.watch(self)
            # A main thread that has noticed gets more time: it may have to print why.
            limit = 2 * EXIT_SECONDS if _own.waited_in_vain or _own.exit_code is not None else EXIT_SECONDS
            if self.over and time.monotonic() - self._over_since > limit:
                self.end(self)
            main.join(self.interval)
            if not main.is_alive():
                self._limit_exit()
                return

    def _patience(self, error: StoreError) -> float:
        """Return for how many seconds the store may be lost before this process ends."""
        if error.silent:
            # A rank that waits for another one finds by itself within the timeout that rank 0 is silent.
            return self.timeout + EXIT_SECONDS / 2
        # Other ranks find that rank 0, which has the store, is gone when their wait fails. If the launcher had it and
        # died, the run saves and stops.
        is_over = self.watch is None or self.of_first_rank is None or self.of_first_rank.ended
        return math.inf if is_over or launcher_has_died() else EXIT_SECONDS

    def publish(self) -> None:
        """Publish the beacon now, and read that of rank 0."""
        self._count += 1
        text = own_beacon(self._count, self._ahead).write()
        try:
            first, over = self.store.call(lambda client: _exchange(client, self.rank, text))
        except StoreError as error:
            self.store_error = error
            # While that process stays; this rank may find that a wait has failed only when it has ended.
            self.is_reported = self.is_reported or has_first_on_host(lost_store_topic())
            return
        self.store_error, self._answered = None, time.monotonic()
        if first is not None and first != self.of_first_rank:  # an older one would show its age as a difference
            self._ahead = 0.0 if first.host == own_host() else time.time() - first.time
            self.of_first_rank = first
        if over and not self.over:
            self.over, self._over_since = over, time.monotonic()

    def _limit_exit(self) -> None:
        """End this process if it failed and has not ended within some seconds after its main thread."""
        # The traceback of an exception that the entry point does not catch has been printed by now.
        failed = _own.exit_code is not None or getattr(sys, "last_value", None) is not None
        if failed and not self.stopped:
            time.sleep(EXIT_SECONDS if exit_code_after_lost_peer() is None else _EXIT_SECONDS_AFTER_SEARCH)
            exit_now(1 if _own.exit_code is None else _own.exit_code)


def exit_now(exit_code: int, last_words: Callable[[], None] | None = None) -> None:
    """End this process without its cleanup, which may block.

    Args:
        exit_code: Exit code of the process.
        last_words: Function that prints something before, for which it has a few seconds.
    """

    def flush() -> None:
        with suppress(OSError, ValueError):
            if last_words is not None:
                last_words()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()

    # The main thread may be blocked while it holds the lock of a stream or of a log.
    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(_LAST_SECONDS)
    os._exit(exit_code)


def lost_store_topic() -> str:
    """Return the topic under which a process of this host reports that the job's store is lost."""
    return f"lost store of {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _exchange(client: Store, rank: int, text: str) -> tuple[Beacon | None, bytes]:
    """Write a beacon; return that of rank 0 and the value of :data:`OVER`, if there are any."""
    client.set(beacon_key(rank), text)
    first, over = beacon_key(0), b""
    if client.check([OVER]):  # unlike a write, this waits for an answer of the store
        over = client.get(OVER)
    return Beacon.read(client.get(first)) if client.check([first]) else None, over
