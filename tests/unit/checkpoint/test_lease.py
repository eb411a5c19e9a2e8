"""One owner per save folder: races, dead and stopped owners, wrong clocks, damaged leases."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from internlm.checkpoint import lease as lease_module
from internlm.checkpoint.lease import LEASE_FILE, Lease, LeaseTimes, Owner, parse_owner, this_owner, to_bytes
from internlm.checkpoint.local_storage import LOCK, LocalStorage
from internlm.checkpoint.storage import COMPARED_BYTES
from internlm.utils.errors import CheckpointError
from tests.harness.pool import run_ranks

QUICK = LeaseTimes(to_live=0.6, renewal=0.05, watch=0.2, poll=0.02)
ROOT = Path(__file__).parents[3]


class Failing(LocalStorage):
    """Storage that cannot be reached while ``is_down``."""

    is_down = False

    def compare_and_swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        if self.is_down:
            raise OSError(5, os.strerror(5), self.path(name))
        return super().compare_and_swap(name, old, new)


@pytest.fixture
def storage(tmp_path: Path) -> Failing:
    return Failing(tmp_path)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Live process, to name as the owner."""
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        yield sleeping
        sleeping.kill()


def owner_of(process: subprocess.Popen[bytes]) -> Owner:
    start = lease_module._process(process.pid)[1]
    return replace(this_owner("other job"), pid=process.pid, process_start=start)


def elsewhere() -> Owner:
    return replace(this_owner("other job"), host="far", boot_id="another machine's")


@contextmanager
def renewing(storage: LocalStorage, owner: Owner, change: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """Renew the lease as its owner would, and call ``change`` after each renewal."""
    stop = threading.Event()

    def renew() -> None:
        count = 0
        while not stop.wait(0.03):
            count += 1
            storage.write(LEASE_FILE, to_bytes(replace(owner, renewed=count)))
            change()

    storage.write(LEASE_FILE, to_bytes(owner))
    change()
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def acquired(storage: LocalStorage, times: LeaseTimes = QUICK) -> float:
    """Acquire and release the lease; return the seconds that it took."""
    begin = time.monotonic()
    lease = Lease.acquire(storage, "my job", times=times)
    seconds = time.monotonic() - begin
    lease.check()
    lease.release()
    return seconds


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- holding


def test_the_lease_names_its_owner_is_renewed_and_is_gone_when_released(storage: Failing) -> None:
    lease = Lease.acquire(storage, "my job", times=QUICK)
    first = parse_owner(storage.read(LEASE_FILE, 9999))
    assert first
    assert (first.pid, first.job, first.boot_id) == (os.getpid(), "my job", this_owner("").boot_id)
    wait_until(lambda: (parse_owner(storage.read(LEASE_FILE, 9999)) or first).renewed > first.renewed + 2)
    lease.check()
    assert not lease.lost
    lease.release()
    lease.release()
    assert storage.names() == [LOCK]


def test_a_lease_that_nobody_uses_any_more_is_not_renewed(storage: Failing) -> None:
    lease = Lease.acquire(storage, "my job", times=QUICK)
    thread = lease._thread
    del lease
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    content = storage.read(LEASE_FILE, 9999)
    time.sleep(3 * QUICK.renewal)
    assert storage.read(LEASE_FILE, 9999) == content


def test_a_forked_process_does_not_release_the_lease(storage: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease.acquire(storage, "my job", times=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        lease.release()
    assert LEASE_FILE in storage.names()
    lease.release()


@pytest.mark.wide
def test_a_run_that_fails_releases_its_lease(storage: Failing) -> None:
    code = f"""
from internlm.checkpoint.lease import Lease
from internlm.checkpoint.local_storage import LocalStorage
lease = Lease.acquire(LocalStorage({str(storage.root)!r}), "job")
print(LocalStorage({str(storage.root)!r}).names())
raise SystemExit(2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, f"['{LOCK}', '{LEASE_FILE}']\n", "")
    assert storage.names() == [LOCK]


@pytest.mark.parametrize("how", ["taken", "deleted", "damaged"])
def test_a_lease_that_is_lost_calls_back_once_and_stops_every_commit(storage: Failing, how: str) -> None:
    reasons: list[str] = []
    lease = Lease.acquire(storage, "my job", on_lost=reasons.append, times=replace(QUICK, renewal=0.2))
    content = {"taken": to_bytes(elsewhere()), "deleted": None, "damaged": b"{"}[how]
    storage.compare_and_swap(LEASE_FILE, storage.read(LEASE_FILE, 9999), content)
    expected = "another run took it over (host far, pid" if how == "taken" else "its lease was deleted or damaged"
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            lease.check()
        assert expected in str(caught.value)
        assert str(caught.value).startswith(f"{storage.location}: ")
    time.sleep(0.3)  # a renewal finds out, too
    assert reasons == [lease.lost]
    lease.release()
    assert (storage.read(LEASE_FILE, 9999) if content else None) == content


def test_a_storage_that_is_down_is_no_loss(storage: Failing, caplog: pytest.LogCaptureFixture) -> None:
    """However long: whether another run has taken the folder over shows when the storage answers again."""
    reasons: list[str] = []
    lease = Lease.acquire(storage, "my job", on_lost=reasons.append, times=QUICK)
    storage.is_down = True
    with pytest.raises(CheckpointError, match=r"lease.json: cannot be renewed \(.*the device failed to read or write"):
        lease.check()
    time.sleep(2 * QUICK.to_live)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    storage.is_down = False
    lease.check()
    assert not lease.lost
    assert reasons == []
    lease.release()


def test_a_callback_may_use_the_lease(storage: Failing) -> None:
    done = threading.Event()

    def release(reason: str) -> None:
        lease.release()
        done.set()

    lease = Lease.acquire(storage, "my job", on_lost=release, times=QUICK)
    storage.write(LEASE_FILE, to_bytes(elsewhere()))
    assert done.wait(10)


# -- live owners


@pytest.mark.parametrize("skew", [0, -1000, 1000])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_live_owner_is_refused_named_and_left_alone_whatever_the_clocks_say(
    storage: Failing, process: subprocess.Popen[bytes], where: str, skew: int
) -> None:
    owner = owner_of(process) if where == "here" else elsewhere()
    (storage.root / "step-1").mkdir()

    def wrong_clock() -> None:
        if skew:
            os.utime(storage.root / LEASE_FILE, (time.time() + skew,) * 2)

    times = replace(QUICK, to_live=3.0, watch=1.0 if skew < 0 else QUICK.watch)
    with renewing(storage, owner, wrong_clock):
        begin = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            Lease.acquire(storage, "my job", times=times)
        assert time.monotonic() - begin < times.to_live
    text = str(caught.value)
    start = f'{storage.location}: owned by a live run (host {owner.host}, pid {owner.pid}, job "other job", renewed '
    assert text.startswith(start)
    assert text.endswith(" s ago). Choose another ckpt.save_ckpt_folder, or stop that run")
    left = parse_owner(storage.read(LEASE_FILE, 9999))
    assert left
    assert left.token == owner.token
    assert storage.names() == [LOCK, LEASE_FILE, "step-1/"]


def test_an_owner_that_ends_while_it_is_watched_is_followed_at_once(
    storage: Failing, process: subprocess.Popen[bytes]
) -> None:
    storage.write(LEASE_FILE, to_bytes(owner_of(process)))
    threading.Timer(0.3, process.kill).start()
    assert 0.2 < acquired(storage, LeaseTimes(poll=0.02)) < 5


def test_the_wait_for_a_lease_to_expire_is_announced(storage: Failing, caplog: pytest.LogCaptureFixture) -> None:
    storage.write(LEASE_FILE, to_bytes(elsewhere()))
    caplog.set_level(logging.INFO)
    acquired(storage, replace(QUICK, to_live=1.5))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "waiting up to 2 s for the lease of host far, pid" in messages[0]
    assert "took over the lease of host far, pid" in messages[1]
    assert messages[1].endswith(": not renewed for 2 s")


# -- stale leases


@pytest.mark.parametrize("how", ["killed", "zombie", "pid reused"])
def test_the_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(
    storage: Failing, process: subprocess.Popen[bytes], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    owner = owner_of(process)
    if how == "pid reused":
        owner = replace(owner, process_start=str(int(owner.process_start) - 100))
    else:
        process.kill()
        wait_until(lambda: lease_module._process(process.pid)[0] == "Z")
    if how == "killed":
        process.wait()
    storage.write(LEASE_FILE, to_bytes(owner))
    assert acquired(storage, LeaseTimes()) < 2
    assert "took over the lease of" in caplog.text
    assert "its process is dead" in caplog.text


def test_a_lease_that_this_process_abandoned_is_taken_over_at_once(storage: Failing) -> None:
    reasons: list[str] = []
    abandoned = Lease.acquire(storage, "my job", on_lost=reasons.append, times=QUICK)
    assert acquired(storage, LeaseTimes()) < 2
    wait_until(lambda: reasons)
    assert abandoned.lost


@pytest.mark.parametrize(
    ("owner", "skew", "seconds"),
    [
        pytest.param(elsewhere(), 0, QUICK.to_live, id="of another host, whose processes are unknown"),
        pytest.param(elsewhere(), -1000, QUICK.watch, id="and old"),
        pytest.param(elsewhere(), 1000, QUICK.to_live, id="and in the future"),
        pytest.param(replace(this_owner("j"), pid_namespace="pid:[1]", pid=1 << 22), 0, QUICK.to_live, id="container"),
        pytest.param(replace(this_owner("j"), boot_id="", pid=1 << 22), 0, QUICK.to_live, id="boots are unknown"),
    ],
)
def test_a_lease_that_nobody_renews_is_taken_over_when_it_has_expired(
    storage: Failing, owner: Owner, skew: int, seconds: float
) -> None:
    storage.write(LEASE_FILE, to_bytes(owner))
    os.utime(storage.root / LEASE_FILE, (time.time() + skew,) * 2)
    assert 0.9 * seconds < acquired(storage) < seconds + 2


GOOD = json.loads(to_bytes(elsewhere()))
DAMAGED: dict[str, bytes] = {
    "garbage": b"\xff\x00garbage",
    "half": to_bytes(elsewhere())[:40],
    "list": b"[]",
    "null": b"null",
    "deep": b"[" * 60000,
    "huge": b"x" * (3 * COMPARED_BYTES),
    "another key": json.dumps({**GOOD, "extra": 1}).encode(),
    "a key less": json.dumps({key: value for key, value in GOOD.items() if key != "token"}).encode(),
    "text as pid": json.dumps({**GOOD, "pid": "1"}).encode(),
    "pid zero": json.dumps({**GOOD, "pid": 0}).encode(),
    "endless pid": json.dumps({**GOOD, "pid": 10**30, "boot_id": this_owner("").boot_id}).encode(),
    "number as host": json.dumps({**GOOD, "host": 1}).encode(),
    "nan": json.dumps({**GOOD, "renewed": float("nan")}).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_lease_is_stale_when_it_is_old(storage: Failing, content: bytes) -> None:
    (storage.root / LEASE_FILE).write_bytes(content)
    os.utime(storage.root / LEASE_FILE, (0, 0))
    assert 0.9 * QUICK.watch < acquired(storage) < 3


def test_an_empty_lease_is_none(storage: Failing) -> None:
    (storage.root / LEASE_FILE).write_bytes(b"")
    assert acquired(storage, LeaseTimes()) < 2


def test_a_lease_cannot_write_into_the_log_what_it_likes(storage: Failing) -> None:
    owner = parse_owner(to_bytes(replace(elsewhere(), host="a\n\x1b[31mb", job="x" * 10_000)))
    assert owner
    assert str(owner).startswith("host a??[31mb, pid")
    assert len(str(owner)) < 300


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_a_lease_that_is_no_file_is_an_error_of_one_line(storage: Failing, what: str) -> None:
    path = storage.root / LEASE_FILE
    {"link": lambda: path.symlink_to("target"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[what]()
    with pytest.raises(CheckpointError) as caught:
        Lease.acquire(storage, "my job", times=QUICK)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- real processes that compete


def compete(rank: int, world_size: int, folder: str, rounds: int) -> list[int]:
    """Acquire a stale lease in each round; return who got it."""
    storage, winners = LocalStorage(folder), []
    times = LeaseTimes(to_live=20, renewal=0.01, watch=0.02, poll=0.002)
    for _ in range(rounds):
        if rank == 0:
            storage.write(LEASE_FILE, to_bytes(replace(this_owner("dead"), process_start="1")))
        dist.barrier()
        lease, refusal = None, ""
        try:
            lease = Lease.acquire(storage, f"rank {rank}", times=times)
            # No other process may get here before this one has released.
            os.close(os.open(f"{folder}/owner", os.O_CREAT | os.O_EXCL))
            time.sleep(0.01)
            lease.check()
            os.unlink(f"{folder}/owner")
        except CheckpointError as error:
            refusal = str(error)
        assert lease or "owned by a live run" in refusal, refusal
        owners: list[int] = [0] * world_size
        dist.all_gather_object(owners, int(lease is not None))
        if lease:
            lease.release()
        winners.append(owners.index(1) if sum(owners) == 1 else -sum(owners))
    return winners


def test_of_processes_that_compete_exactly_one_gets_the_lease(tmp_path: Path) -> None:
    """100 rounds in which both processes take over the same stale lease, as long as they need to see each other."""
    winners, others = run_ranks(2, compete, str(tmp_path), 100)
    assert winners == others
    assert set(winners) == {0, 1}


def stop_and_go(rank: int, world_size: int, folder: str) -> list[str]:
    """Rank 1 owns the lease and is stopped; rank 0 takes it over; rank 1 goes on, and tries to commit."""
    storage, reasons = LocalStorage(folder), list[str]()
    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    lease = Lease.acquire(storage, "rank 1", on_lost=reasons.append, times=QUICK) if rank == 1 else None
    dist.barrier()
    if rank == 0:
        os.kill(pids[1], signal.SIGSTOP)
        try:
            lease = Lease.acquire(storage, "rank 0", times=QUICK)
        finally:
            os.kill(pids[1], signal.SIGCONT)
    else:
        assert lease
        mine = lease._owner.token.encode()
        wait_until(lambda: mine not in storage.read(LEASE_FILE, 9999))
        try:
            lease.check()
        except CheckpointError as error:
            reasons.append(str(error))
        time.sleep(3 * QUICK.renewal)
    dist.barrier()
    assert lease
    lease.release()
    return reasons


def test_an_owner_that_was_stopped_for_too_long_finds_out_before_it_commits(tmp_path: Path) -> None:
    first, second = run_ranks(2, stop_and_go, str(tmp_path))
    assert first == []
    assert len(second) == 2  # from the callback, and from the check
    assert all("another run took it over (host " in text and 'job "rank 0"' in text for text in second)
    assert LocalStorage(tmp_path).names() == [LOCK]
