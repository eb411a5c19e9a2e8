"""Whom a rank blames that has waited in vain."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from internlm.utils import lost_ranks, progress
from internlm.utils.errors import ConfigError, LostPeerError, Problem, naming_lost_ranks
from internlm.utils.lost_ranks import Finding, find_lost_rank, format_ranks, record_failure
from internlm.utils.progress import Beacon, beacon_key, enter_phase, in_phase, interval, own_beacon, own_phase
from internlm.utils.torch_private import default_store

CLOSED, TIMED_OUT = "Connection closed by peer [::1]:1234", "Timed out waiting 30000ms for recv operation to complete"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """The store of a job of four ranks, of which this process is rank 1 and the others are what tests write."""
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lost_ranks.start_beacons(1, 4, timeout=30)
    yield default_store()
    lost_ranks.stop_beacons()
    progress.restart()
    dist.destroy_process_group()


class Others:
    """Ranks 0, 2 and 3, which publish beacons in a thread, except for those that are silent.

    They have been in their phase for ``ago`` seconds, and the clocks of their hosts are ``behind`` by some seconds.
    """

    def __init__(self, store: dist.Store, silent: tuple[int, ...] = (), **of_rank: dict[str, Any]) -> None:
        self.store, self.silent = store, silent
        waiting = {"phase": "backward", "step": 17, "waiting": True, "code": "", "ago": 0, "behind": 0}
        self.states = {rank: {**waiting, **of_rank.get(f"rank_{rank}", {})} for rank in (0, 2, 3)}
        for state in self.states.values():
            state["since"] = time.time() - state.pop("ago") - state["behind"]
        self.count = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._publish(self.states)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.ended.wait(0.01):
            self._publish([rank for rank in self.states if rank not in self.silent])

    def _publish(self, ranks: Any) -> None:
        self.count += 1
        for rank in ranks:
            state = dict(self.states[rank])
            beacon = json.loads(own_beacon(self.count, state.pop("behind")).write()) | state
            self.store.set(beacon_key(rank), json.dumps(beacon))


ELSEWHERE = {"host": "another"}
ENDED = {"started": "before this process"}

#: Error of the wait, silent ranks, what ranks publish, message ("for 0 s": of any duration).
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, dict[str, Any]], str]] = {
    "silent": (TIMED_OUT, (3,), {}, "rank 3 silent for 0 s, last seen in backward of step 17"),
    "several are silent": (
        TIMED_OUT,
        (2, 3),
        {"rank_3": {"phase": "data wait"}},
        "rank 2 silent for 0 s, last seen in backward of step 17; "
        "rank 3 silent for 0 s, last seen in data wait of step 17",
    ),
    "ended on this host": (
        TIMED_OUT,
        (2,),
        {"rank_2": {**ENDED, "phase": "save", "step": 41}},
        "rank 2 is gone, last seen in save of step 41",
    ),
    "ended on another host": (CLOSED, (2,), {"rank_2": ELSEWHERE}, "rank 2 is gone, last seen in backward of step 17"),
    "silent on another host": (
        TIMED_OUT,
        (2,),
        {"rank_2": ELSEWHERE},
        "rank 2 silent for 0 s, last seen in backward of step 17",
    ),
    "a host is gone": (
        CLOSED,
        (2, 3),
        {"rank_2": ELSEWHERE, "rank_3": ELSEWHERE},
        "ranks 2-3 are gone, last seen in backward of step 17",
    ),
    "a pid that another host has": (
        TIMED_OUT,
        (),
        {"rank_2": {**ELSEWHERE, **ENDED, "waiting": False}},
        "rank 2 has been in backward of step 17 for 0 s",
    ),
    "at work while others wait": (
        TIMED_OUT,
        (),
        {"rank_3": {"waiting": False, "code": "internlm/data/loader.py:98", "phase": "data wait"}},
        "rank 3 has been in data wait of step 17 for 0 s (internlm/data/loader.py:98)",
    ),
    "two at work": (
        TIMED_OUT,
        (),
        {"rank_0": {"waiting": False, "step": 18}, "rank_2": {"waiting": False}},
        "rank 2 has been in backward of step 17 for 0 s",
    ),
    "two at work in an equal phase": (
        TIMED_OUT,
        (),
        {"rank_2": {"waiting": False}, "rank_3": {"waiting": False}},
        "ranks 2-3 have been in backward of step 17 for 0 s",
    ),
    "a phase of a user's script": (
        TIMED_OUT,
        (),
        {"rank_2": {"waiting": False, "phase": "my own"}, "rank_3": {"waiting": False, "phase": "save"}},
        "rank 3 has been in save of step 17 for 0 s",
    ),
    "all wait": (
        TIMED_OUT,
        (),
        {"rank_2": {"phase": "save"}},
        "no rank is lost, but all wait: ranks 0, 3 in backward of step 17; rank 1 in forward of step 17; "
        f"rank 2 in save of step 17 ({TIMED_OUT})",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_lost_rank_is_named(case: str, store: dist.Store) -> None:
    cause, silent, of_rank, message = CASES[case]
    enter_phase("forward", 17)
    with Others(store, silent, **of_rank):
        finding = find_lost_rank(cause)
    assert _without_seconds(finding.message) == message
    assert (finding.exit_code, finding.prints) == (3, True)


def _without_seconds(text: str) -> str:
    """Return a message with all durations as 0 s, since they grow on a busy machine."""
    return re.sub(r"for \d+ s\b", "for 0 s", text)


def test_the_duration_of_a_phase_is_counted_from_its_start(store: dist.Store) -> None:
    with Others(store, rank_3={"waiting": False, "phase": "data wait", "ago": 30}):
        message = find_lost_rank(TIMED_OUT).message
    assert re.fullmatch(r"rank 3 has been in data wait of step 17 for 3[0-5] s", message)


@pytest.mark.parametrize("behind", [3600, -3600])
@pytest.mark.parametrize("silent", [(), (3,)])
def test_durations_do_not_depend_on_the_clocks_of_hosts(silent: tuple[int], behind: int, store: dist.Store) -> None:
    """Beacons have the clock of rank 0's host; the others are on it, and this rank is on another."""
    host = {"host": "another", "behind": behind}
    late = {"waiting": False, "ago": 30}
    with Others(store, silent, rank_0=host, rank_2=host, rank_3={**host, **late}):
        message = find_lost_rank(TIMED_OUT).message
        assert abs(time.time() - behind - Beacon.read(store.get(beacon_key(1))).time) < 5
    fate = "silent for [0-5] s, last seen in" if silent else "has been in"
    end = "" if silent else " for 3[0-5] s"
    assert re.fullmatch(f"rank 3 {fate} backward of step 17{end}", message)


def test_a_rank_that_never_published_did_not_start(store: dist.Store) -> None:
    others = Others(store)
    del others.states[2]
    with others:
        assert find_lost_rank(TIMED_OUT).message == "rank 2 did not start"


def test_one_rank_prints_what_all_find(store: dist.Store) -> None:
    """The first, even where the second has not seen that anything is wrong yet."""
    with Others(store, silent=(3,)):
        first = find_lost_rank(TIMED_OUT)
        second = find_lost_rank(CLOSED)
    assert first.prints
    assert second == Finding(first.message)


def test_the_second_rank_waits_for_the_finding_of_the_first(store: dist.Store) -> None:
    store.add("internlm/finders", 1)
    finding = json.dumps({"message": "rank 9 is gone", "exit_code": 3, "prints": False, "stay": 0})
    threading.Timer(0.2, store.set, ["internlm/over", finding]).start()
    assert find_lost_rank(CLOSED) == Finding("rank 9 is gone")


def test_if_the_first_rank_is_lost_too_the_second_prints_what_it_knows(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_ranks, "FINDER_SECONDS", 0.1)
    store.add("internlm/finders", 1)
    assert find_lost_rank(CLOSED) == Finding(f"lost another rank ({CLOSED})", prints=True)
    assert find_lost_rank(CLOSED) == Finding(f"lost another rank ({CLOSED})")


@pytest.mark.parametrize(
    ("error", "exit_code", "expected"),
    [
        (ValueError("a bug"), 1, Finding("rank 1 stopped with ValueError in update of step 3. See its traceback", 3)),
        (ConfigError(Problem("a", "1")), 2, Finding("", 2)),  # that rank has printed it
    ],
)
def test_a_rank_that_has_stopped_with_an_error_is_not_lost(
    error: Exception, exit_code: int, expected: Finding, store: dist.Store
) -> None:
    """The first of the others says which it was, unless that rank has printed what the user can fix."""
    enter_phase("update", 3)
    record_failure(error, exit_code)
    record_failure(KeyError("a consequence"), 1)
    assert find_lost_rank(CLOSED) == replace(expected, prints=bool(expected.message))
    assert find_lost_rank(CLOSED) == expected


@pytest.mark.parametrize(
    ("launcher", "silent", "expected"),
    [
        (False, True, r"rank 0 silent for \d+ s, last seen in evaluation of step 7"),
        (False, False, "rank 0 is gone, last seen in evaluation of step 7"),
        (True, True, r"lost another rank, and the launcher's store is silent for \d+ s"),
        (True, False, "lost another rank, and the launcher's store is gone"),
    ],
)
def test_a_store_that_is_lost_is_that_of_rank_0(
    launcher: bool, silent: bool, expected: str, store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a launcher has it."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(launcher))
    monkeypatch.setenv("MASTER_PORT", f"{launcher}{silent}")
    thread = lost_ranks._thread
    assert thread is not None
    thread.stopped = True
    thread.join()
    thread.of_first_rank = Beacon.read(
        json.dumps(json.loads(own_beacon(1).write()) | {"phase": "evaluation", "step": 7}).encode()
    )

    def fail(function: object, seconds: float = 0) -> None:
        raise lost_ranks.StoreError(silent)

    monkeypatch.setattr(thread.store, "call", fail)
    finding = find_lost_rank(TIMED_OUT)
    assert re.fullmatch(expected, finding.message)
    assert finding.prints
    assert not find_lost_rank(TIMED_OUT).prints  # once on each host


def test_without_beacons_the_cause_is_all_that_is_known() -> None:
    assert find_lost_rank(CLOSED) == Finding(f"lost another rank ({CLOSED})", prints=True)
    progress.restart()


# -- errors of waits


@pytest.mark.parametrize(
    "text", ["[pair.cc:1] Connection closed by peer [::1]:1", "Application timeout caused pair closure"]
)
def test_the_error_of_a_wait_becomes_one_that_names_the_rank(text: str) -> None:
    with pytest.raises(LostPeerError, match="lost another rank") as caught, naming_lost_ranks():
        raise RuntimeError(text)
    assert caught.value.__suppress_context__
    with pytest.raises(LostPeerError) as again, naming_lost_ranks():
        raise caught.value
    assert again.value is caught.value
    progress.restart()


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shape"), naming_lost_ranks():
        raise RuntimeError("shape mismatch")


# -- progress


def test_phases() -> None:
    enter_phase("loading")
    assert own_phase() == "loading"
    enter_phase("forward", 17)
    with in_phase("evaluation"):
        assert own_phase() == "evaluation of step 17"
    assert own_phase() == "forward of step 17"
    with pytest.raises(ValueError, match="a bug"), in_phase("save", 18):
        raise ValueError("a bug")
    assert own_phase() == "save of step 18"  # where it was raised
    progress.restart()


def test_a_phase_costs_less_than_two_microseconds() -> None:
    best = min(_seconds_of_phases(1000) for _ in range(20))
    progress.restart()
    assert best / 1000 < 2e-6


def _seconds_of_phases(count: int) -> float:
    start = time.perf_counter()
    for step in range(count):
        enter_phase("forward", step)
    return time.perf_counter() - start


@pytest.mark.parametrize(("ranks", "seconds"), [(2, 1.0), (1000, 1.0), (4096, 4.096)])
def test_the_store_gets_at_most_a_thousand_beacons_a_second(ranks: int, seconds: float) -> None:
    assert interval(ranks) == seconds


def test_a_beacon_says_whether_the_main_thread_waits_for_others() -> None:
    """Of a rank that waits for its data it says where."""
    at_work, waiting = (
        _beacon_within(file) for file in (progress.__file__, "/site-packages/torch/distributed/c10d.py")
    )
    assert (at_work.waiting, waiting.waiting) == (False, True)
    assert at_work.code.startswith("internlm/utils/progress.py:")
    assert at_work.pid == os.getpid()
    assert at_work.started == progress.start_time(os.getpid()) != ""


def _beacon_within(file: str) -> Beacon:
    """Return the beacon while the main thread blocks in code of ``file``."""
    begun, done = threading.Event(), threading.Event()
    beacons: list[Beacon] = []

    def look() -> None:
        begun.wait()
        beacons.append(own_beacon(1))
        done.set()

    thread = threading.Thread(target=look)
    thread.start()
    exec(compile("begun.set()\ndone.wait()", file, "exec"), {"begun": begun, "done": done})
    thread.join()
    return beacons[0]


def test_a_process_that_ended_has_no_start_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert progress.start_time(process.pid)
    process.kill()
    deadline = time.monotonic() + 5
    while progress.start_time(process.pid) and time.monotonic() < deadline:  # a zombie from then on
        time.sleep(0.01)
    assert progress.start_time(process.pid) == ""
    process.communicate()
    assert progress.start_time(process.pid) == ""


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 7], "ranks 0-2, 7"), (range(4096), "ranks 0-4095")]
)
def test_ranks_are_named_by_ranges(ranks: Any, text: str) -> None:
    assert format_ranks(ranks) == text


# -- where no wait fails


@pytest.mark.parametrize(
    ("silent", "of_rank", "line"),
    [
        ((), {"rank_2": ENDED}, "rank 2 is gone, last seen in backward of step 17\n"),
        ((3,), {}, "rank 3 silent for 0 s, last seen in backward of step 17\n"),
        ((2, 3), {"rank_2": {**ENDED, "ended": True}, "rank_3": {"ended": True}}, ""),
        ((), {}, ""),
    ],
)
def test_a_watch_finds_lost_ranks_by_itself(
    silent: tuple[int, ...], of_rank: dict[str, Any], line: str, store: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not those that have ended well."""
    thread = lost_ranks._thread
    assert thread is not None
    thread.timeout = 0.2
    watch = lost_ranks.Watch(0, 4)
    watch.ranks = (2, 3)  # type: ignore[assignment]
    with Others(store, silent, **of_rank):
        deadline = time.monotonic() + 0.5
        while not thread.over and time.monotonic() < deadline:
            watch(thread)
            time.sleep(0.02)
    assert _without_seconds(capsys.readouterr().err) == line
    assert bool(thread.over) == bool(line)


@pytest.mark.parametrize(("launcher", "seconds"), [("died", math.inf), ("runs", progress.EXIT_SECONDS)])
def test_ranks_that_watch_save_and_stop_if_the_store_is_lost_with_their_launcher(
    launcher: str, seconds: float, store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    if launcher == "died":
        monkeypatch.setattr(os, "getppid", lambda: 1)
    thread = lost_ranks._thread
    assert thread is not None
    thread.watch, thread.of_first_rank = lost_ranks.Watch(0, 4), own_beacon(1)
    assert thread._patience(lost_ranks.StoreError(silent=False)) == seconds


def test_rank_0_watches_all_and_rank_1_watches_rank_0() -> None:
    assert [list(lost_ranks.Watch(rank, 4).ranks) for rank in range(4)] == [[1, 2, 3], [0], [], []]


def test_a_process_that_ends_well_says_so(store: dist.Store) -> None:
    lost_ranks.stop_beacons()
    assert Beacon.read(store.get(beacon_key(1))).ended
