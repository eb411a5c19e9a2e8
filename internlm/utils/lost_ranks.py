"""Attribution of a failed wait: which rank is gone, silent or behind, and what it was doing last.

A rank that waits in vain rarely waits for the lost rank itself: its neighbour may wait as well. So the first rank whose
wait fails reads the beacons of all ranks (:mod:`internlm.utils.progress`) twice, and names, in this order:

1. the rank that stopped with an error, which it has recorded in the store before it ended;
2. ranks whose process is gone, or whose beacon no longer changes;
3. of the ranks that do not wait for another, those with the earliest phase.

It writes its finding to the store, where the threads of the others read it, so that it is printed once, and a rank that
is only late ends as well. Everything is bounded in time, also when the process that holds the store is the lost one.

This file must not import torch, see :mod:`internlm.utils.errors`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from internlm.utils import progress
from internlm.utils.job_store import (
    ANSWER_SECONDS,
    PREFIX,
    JobStore,
    StoreError,
    close_job_store,
    first_on_host,
    job_store,
)
from internlm.utils.progress import OVER, PHASES, Beacon, BeaconThread, beacon_key, format_phase, lost_store_topic

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_FAILURE, EXIT_LOST_PEER = 1, 3
#: Texts in the errors of a connection whose other end is closed, in gloo's words and torch's.
_CLOSED_TEXTS = ("closed", "reset by peer", "Broken pipe")
#: Two reads of the beacons are so many intervals apart: a rank that runs publishes at least once in between.
INTERVALS = 2.2
#: Share of the timeout after which a watched rank is silent: before the watchdog of NCCL aborts the process.
SHARE_OF_TIMEOUT = 0.9
#: Seconds after the second read in which the other ranks wait for the finding.
FINDER_SECONDS = 2.0
#: Seconds in which a process writes its stack.
_STACK_SECONDS = 0.3
_FINDERS = f"{PREFIX}finders"


@dataclass(frozen=True)
class Finding:
    """Why a wait failed."""

    message: str  # empty if another rank has printed the reason already
    exit_code: int = EXIT_LOST_PEER
    #: Whether this rank prints the message: it was the first to find it.
    prints: bool = False
    #: Seconds that this rank stays after it has printed the message.
    stay: float = 0.0


# -- this rank's part -------------------------------------------------------------------------------------------------
_thread: BeaconThread | None = None


def start_beacons(rank: int, world_size: int, timeout: float, watches: bool = False) -> None:
    """Publish beacons of this rank from now on; the default process group must exist.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout: Timeout of the process groups in seconds.
        watches: Whether to look for lost ranks all the time, since no wait fails in Python code, as under NCCL.
    """
    global _thread
    stop_beacons()
    progress.restart()
    store = job_store()
    assert store is not None, "beacons need a process group"
    _thread = BeaconThread(store, rank, world_size, timeout, _end, Watch(rank, world_size) if watches else None)
    _thread.start()


def stop_beacons() -> None:
    """Publish no more beacons."""
    global _thread
    if _thread is not None:
        _thread.stopped = True
        progress.note_end()
        _thread.publish()
        _thread = None
        close_job_store()


def end_beacons() -> None:
    """Publish no more beacons; end the process if it has lost a peer, whose process groups would block its cleanup."""
    exit_code = progress.exit_code_after_lost_peer()
    if exit_code is not None:
        progress.exit_now(exit_code)
    stop_beacons()


def record_failure(error: Exception, exit_code: int) -> None:
    """Record in the store that this rank stops with ``error``, so that it is not reported as lost."""
    if _thread is None:
        return
    if exit_code == EXIT_FAILURE:
        message = f"rank {_thread.rank} stopped with {type(error).__name__} in {progress.own_phase()}"
        finding = Finding(f"{message}. See its traceback")
        with suppress(StoreError):
            _agree(_thread, finding)
    else:  # an error that the user can fix, which this rank prints
        record_stop(exit_code)


def record_stop(exit_code: int) -> None:
    """Record in the store that this rank stops for a reason that it prints; the others end with its exit code."""
    if _thread is not None:
        with suppress(StoreError):
            _agree(_thread, Finding("", exit_code))


def recorded_exit_code() -> int:
    """Return the exit code for this rank if another has recorded why the job ends, else 0."""
    if _thread is None:
        return 0
    _thread.publish()  # reads what is recorded
    return Finding(**json.loads(_thread.over)).exit_code if _thread.over else 0


def find_lost_rank(cause: str) -> Finding:
    """Find out why a wait of this rank for another failed; bounded in time.

    Args:
        cause: Error of the failed wait, one line.
    """
    progress.note_vain_wait()
    thread = _thread
    if thread is None:
        return Finding(f"lost another rank ({cause})", prints=True)
    try:
        thread.publish()  # so that no other rank suspects this one
        finders = _count_finder(thread)
        if finders > 1 and not thread.over:
            _wait_for_finding(thread)
        if thread.over:
            return _agree(thread, Finding(""), prints=finders == 1)
        # The first to look for it is lost as well where the second has waited for its finding in vain.
        message = _investigate(thread, cause) if finders == 1 else f"lost another rank ({cause})"
        return _agree(thread, Finding(message), prints=finders <= 2)
    except StoreError as error:
        return _lost_store(thread, error.silent)


def _count_finder(thread: BeaconThread) -> int:
    """Count this rank among those that have found that the job is over, and return their number."""
    return thread.store.call(lambda client: client.add(_FINDERS, 1))


def _wait_for_finding(thread: BeaconThread) -> None:
    """Wait until the thread reads what the rank that looks for the lost one has found, for at most some seconds."""
    deadline = time.monotonic() + (INTERVALS + 1) * thread.interval + FINDER_SECONDS
    while not thread.over and time.monotonic() < deadline:
        time.sleep(0.05)


def _agree(thread: BeaconThread, finding: Finding, prints: bool = False) -> Finding:
    """Record why the job ends, unless another rank has recorded it already, and return what is recorded."""
    text = json.dumps(asdict(finding))
    recorded = Finding(**json.loads(thread.store.call(lambda client: client.compare_set(OVER, "", text))))
    thread.publish()
    if thread.rank == 0 and not hosted_by_launcher():
        # The store ends with this process. Until then the threads of all ranks read what is recorded, since a rank may
        # find that its wait has failed only when this process has ended.
        time.sleep(1.2 * thread.interval)
    return replace(recorded, prints=prints and bool(recorded.message))


def _lost_store(thread: BeaconThread, silent: bool) -> Finding:
    """Return the finding of a rank that cannot reach the store, which is silent or else gone."""
    if thread.over:
        return Finding(**json.loads(thread.over))
    fate = f"silent for {thread.silent_for:.0f} s" if silent else "is gone"
    first = thread.of_first_rank
    if hosted_by_launcher():
        message = f"lost another rank, and the launcher's store {'is ' if silent else ''}{fate}"
    else:
        phase = format_phase(first.phase, first.step) if first else "start"
        message = f"rank 0 {fate}, last seen in {phase}"
    # The threads of the other ranks on this host look for this report with each beacon.
    stay = 1.2 * thread.interval + (ANSWER_SECONDS if silent else 0)
    return Finding(message, prints=not thread.is_reported and first_on_host(lost_store_topic()), stay=stay)


def hosted_by_launcher() -> bool:
    """Return whether the job's store is in a process of torchrun; otherwise it is in that of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def print_finding(finding: Finding) -> None:
    """Print a finding to stderr, on the rank that prints it."""
    if finding.prints:
        print(finding.message, file=sys.stderr, flush=True)
        time.sleep(finding.stay)


def _end(thread: BeaconThread) -> None:
    """End this process, whose main thread is blocked, in a thread."""
    finding = _lost_store(thread, silent=thread.store_error is not None and thread.store_error.silent)
    if thread.over:  # no wait of another rank may have failed yet
        with suppress(StoreError):
            finding = replace(finding, prints=bool(finding.message) and _count_finder(thread) == 1)
    progress.exit_now(finding.exit_code, lambda: print_finding(finding))


class Watch:
    """Search for lost ranks by rank 0, and for rank 0 by rank 1, without a wait that has failed.

    It ends the job: all threads read the finding and end their processes, whose main threads are blocked in a sync
    with the device.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.ranks = range(1, world_size) if rank == 0 else range(1) if rank == 1 else range(0)
        self.changed: dict[int, tuple[Beacon, float]] = {}  # last beacon of each rank, and when it was read first

    def __call__(self, thread: BeaconThread) -> None:
        """Read the beacons, and record a finding if a rank is gone or silent."""
        if not self.ranks:
            return
        with suppress(StoreError):  # the thread itself ends the process if this lasts
            now = time.monotonic()
            for rank, beacon in _read_beacons(thread.store, self.ranks).items():
                if beacon.ended:
                    self.changed.pop(rank, None)
                elif rank not in self.changed or self.changed[rank][0] != beacon:
                    self.changed[rank] = beacon, now
            gone = {rank: beacon for rank, (beacon, _) in self.changed.items() if has_ended(beacon)}
            limit = SHARE_OF_TIMEOUT * thread.timeout
            silent = {rank: beacon for rank, (beacon, since) in self.changed.items() if now - since > limit}
            if gone or silent:
                finding = Finding(name_gone(gone) if gone else name_silent(silent, thread.now()))
                first = _count_finder(thread) == 1
                print_finding(_agree(thread, finding, prints=first))


# -- the search -------------------------------------------------------------------------------------------------------
def _investigate(thread: BeaconThread, cause: str) -> str:
    """Return a message that names the lost rank, or states that no rank is lost."""
    ranks = [rank for rank in range(thread.world_size) if rank != thread.rank]
    before = _read_beacons(thread.store, ranks)
    deadline = time.monotonic() + INTERVALS * thread.interval
    while time.monotonic() < deadline:
        # More than once, since the connections of a process end before the process does.
        if gone := {rank: beacon for rank, beacon in before.items() if has_ended(beacon)}:
            return name_gone(gone)
        time.sleep(0.1)
    beacons = _read_beacons(thread.store, ranks)
    silent = {rank: beacon for rank, beacon in beacons.items() if beacon == before.get(rank)}
    if silent:
        elsewhere = {rank: beacon for rank, beacon in silent.items() if beacon.host != progress.own_host()}
        # Of another host's processes, only the connections show that they have ended.
        closed = any(text in cause for text in _CLOSED_TEXTS)
        return name_gone(elsewhere) if closed and elsewhere else name_silent(silent, thread.now())
    late = behind(beacons)
    if late:
        _ask_for_stacks(late)
        return name_late(late, thread.now())
    if absent := [rank for rank in ranks if rank not in beacons]:
        return f"{format_ranks(absent)} did not start"
    own = {thread.rank: progress.own_beacon(0)}
    return f"no rank is lost, but all wait: {_by_phase({**beacons, **own}, '{ranks} in {phase}')} ({cause})"


def _read_beacons(store: JobStore, ranks: Iterable[int]) -> dict[int, Beacon]:
    """Return the beacons of the given ranks that have published one."""
    keys = {rank: beacon_key(rank) for rank in ranks}

    def read(client: Store) -> dict[int, bytes]:
        found = keys
        if not client.check(list(keys.values())):  # reading a key that is not there would block
            found = {rank: key for rank, key in keys.items() if client.check([key])}
        return dict(zip(found, client.multi_get(list(found.values())), strict=True)) if found else {}

    return {rank: Beacon.read(text) for rank, text in store.call(read, 2 * progress.SECONDS).items()}


def has_ended(beacon: Beacon) -> bool:
    """Return whether the process of a beacon is known to have ended, which only its own host can say."""
    return beacon.host == progress.own_host() and progress.start_time(beacon.pid) != beacon.started


def name_gone(beacons: Mapping[int, Beacon]) -> str:
    """Return the message about ranks whose processes have ended."""
    return _by_phase(beacons, "{ranks} {are} gone, last seen in {phase}")


def name_silent(beacons: Mapping[int, Beacon], now: float) -> str:
    """Return the message about ranks whose beacons no longer change at time ``now``, by the clock of beacons."""
    seconds = max(now - min(beacon.time for beacon in beacons.values()), 0)
    return _by_phase(beacons, f"{{ranks}} silent for {seconds:.0f} s, last seen in {{phase}}")


def name_late(beacons: Mapping[int, Beacon], now: float) -> str:
    """Return the message about ranks for which the others wait at time ``now``, by the clock of beacons."""
    first = min(beacons.values(), key=lambda beacon: beacon.since)
    code = f" ({first.code})" if first.code else ""
    return _by_phase(beacons, f"{{ranks}} {{have}} been in {{phase}} for {max(now - first.since, 0):.0f} s{code}")


def _by_phase(beacons: Mapping[int, Beacon], template: str) -> str:
    """Format the ranks of each phase by ``template``, with its words ``ranks``, ``phase``, ``are`` and ``have``."""
    by_phase: dict[str, list[int]] = {}
    for rank, beacon in sorted(beacons.items()):
        by_phase.setdefault(format_phase(beacon.phase, beacon.step), []).append(rank)
    return "; ".join(
        template.format(
            ranks=format_ranks(ranks),
            phase=phase,
            are="are" if len(ranks) > 1 else "is",
            have="have" if len(ranks) > 1 else "has",
        )
        for phase, ranks in by_phase.items()
    )


def behind(beacons: Mapping[int, Beacon]) -> dict[int, Beacon]:
    """Return the ranks that do not wait for another rank; of several, those in the earliest phase."""

    def order(beacon: Beacon) -> tuple[int, int]:
        return beacon.step, PHASES.index(beacon.phase) if beacon.phase in PHASES else len(PHASES)

    at_work = {rank: beacon for rank, beacon in beacons.items() if not beacon.waiting}
    earliest = min(map(order, at_work.values()), default=None)
    return {rank: beacon for rank, beacon in at_work.items() if order(beacon) == earliest}


def _ask_for_stacks(beacons: Mapping[int, Beacon]) -> None:
    """Let the ranks on this host write their stacks to their stderr."""
    here = [beacon for beacon in beacons.values() if beacon.host == progress.own_host() and beacon.dumps_stack]
    for beacon in here:
        try:
            os.kill(beacon.pid, signal.SIGUSR2)
        except OSError:  # it has ended, or belongs to another user
            continue
    if here:
        time.sleep(_STACK_SECONDS)


def format_ranks(ranks: Iterable[int]) -> str:
    """Format ascending ranks: ``"rank 3"``, ``"ranks 0-6, 9"``."""
    numbers = list(ranks)
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {format_ranges(numbers)}"


def format_ranges(numbers: Iterable[int]) -> str:
    """Format ascending numbers as ranges: ``"0-6, 9"``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
