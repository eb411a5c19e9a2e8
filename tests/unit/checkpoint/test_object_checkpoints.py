"""Checkpoints in an object store: what commits them, and what is left of saves that were interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from internlm.checkpoint import object_storage
from internlm.checkpoint.lease import LEASE_FILE, Lease, LeaseTimes, this_owner, to_bytes
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.checkpoint.save_folder import SaveFolder
from internlm.checkpoint.saved_checkpoint import find_checkpoints
from internlm.checkpoint.storage import MANIFEST, partial_name
from internlm.cli.main import main
from internlm.utils.errors import CheckpointError
from tests.harness.object_server import Fault, ObjectServer
from tests.unit.checkpoint.samples import in_ranges, save_to
from tests.unit.checkpoint.stores import HASTY, PART, manifest_of, put, save


@pytest.fixture
def storage(objects: ObjectStorage) -> ObjectStorage:
    return objects


def test_a_deleted_checkpoint_loses_its_manifest_first(storage: ObjectStorage, server: ObjectServer) -> None:
    save(storage, "step-40", "a")
    server.faults = [Fault(r"POST .*delete", "status", times=99, status=403, code="AccessDenied")]
    with pytest.raises(PermissionError, match="AccessDenied"):  # which the run logs
        storage.withdraw("step-40", "b")
    assert storage.names("step-40") == ["a/"]
    assert storage.leftovers() == {"step-40/a": "step-40"}
    with pytest.raises(FileNotFoundError):
        storage.withdraw("step-40", "c")
    server.faults = []
    SaveFolder(storage).tidy()
    assert storage.names() == []


def test_leftovers_are_attempts_that_no_manifest_names(storage: ObjectStorage) -> None:
    save(storage, "step-1", "good")
    put(storage, "step-1/bad/rank-00000.bin")
    put(storage, "step-2/bad/rank-00000.bin")
    put(storage, "notes/old/file")
    put(storage, "step-3/other/file")
    storage.write(f"step-3/{MANIFEST}", b"damaged")
    sink = storage.create("step-4/begun/rank-00000.bin")
    sink.write(memoryview(bytes(PART)))
    expected = {"step-1/bad": "step-1", "step-2/bad": "step-2", "step-4/begun": "step-4"}
    assert storage.leftovers() == expected
    for folder in expected:
        storage.remove(folder)
    assert storage.leftovers() == {}
    assert storage.names() == ["notes/", "step-1/", "step-3/"]
    assert storage.names("step-3") == [MANIFEST, "other/"]


def test_a_lease_is_held_lost_and_released(storage: ObjectStorage) -> None:
    quick = LeaseTimes(to_live=30, renewal=0.1, watch=0.3, poll=0.05)
    lease = Lease.acquire(storage, "first", times=quick)
    lease.check()
    lease.release()
    lease = Lease.acquire(storage, "second", times=quick)
    other = replace(this_owner("other"), boot_id="another machine's")
    storage.write(LEASE_FILE, to_bytes(other))
    with pytest.raises(CheckpointError, match=r'another run took it over .* job "other"'):
        lease.check()
    lease.release()
    assert storage.read(LEASE_FILE, 9999) == to_bytes(other)


def test_an_attempt_that_failed_is_discarded_but_not_one_that_was_published_after_all(storage: ObjectStorage) -> None:
    put(storage, "step-1/bad/rank-00000.bin")
    storage.discard("step-1", "bad")
    assert storage.names() == []
    save(storage, "step-1", "good")
    put(storage, "step-1/bad/rank-00000.bin")
    storage.discard("step-1", "good")
    storage.discard("step-1", "bad")
    assert storage.names("step-1") == ["good/", MANIFEST]


def test_a_run_that_publishes_in_between_is_not_overwritten(storage: ObjectStorage, server: ObjectServer) -> None:
    server.faults = [
        Fault(f"HEAD .*{MANIFEST}", "then", action=lambda: storage.write(f"step-1/{MANIFEST}", b"another's"))
    ]
    with pytest.raises(FileExistsError, match="another run has just saved this checkpoint") as caught:
        save(storage, "step-1", "mine")
    assert caught.value.filename == storage.path("step-1")
    assert storage.read(f"step-1/{MANIFEST}", 99) == b"another's"
    server.faults = [
        Fault(f"HEAD .*{MANIFEST}", "then", action=lambda: storage.write(f"step-1/{MANIFEST}", b"a third's"))
    ]
    with pytest.raises(FileExistsError, match="another run has just saved this checkpoint"):
        save(storage, "step-1", "mine")
    assert storage.read(f"step-1/{MANIFEST}", 99) == b"a third's"


def test_checkpoints_are_listed_verified_and_deleted_by_commands(
    storage: ObjectStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (30, 40):
        save_to(storage, f"step-{step}", {"model/w": in_ranges(torch.arange(48.0), [20])}, step)
    put(storage, "step-50/b2/rank-00000.bin")
    assert not main(["ckpt", "ls", storage.location])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    listed = [("step-50", "unfinished"), ("step-40", "committed"), ("step-30", "committed")]
    assert [(row[0], row[-1]) for row in rows] == listed
    assert not main(["ckpt", "prune", storage.location, "--keep-last", "1", "--unfinished", "--yes"])
    assert "step-40 verifies and is kept" in capsys.readouterr().out
    assert [name for name in storage.names() if name.startswith("step")] == ["step-40/"]
    put(storage, "step-40/a1/rank-00000.bin")
    assert main(["ckpt", "verify", f"{storage.location}/step-40"]) == 2
    file = f"{storage.location}/step-40/a1/rank-00000.bin"
    assert capsys.readouterr().out == f"{file}: 7 bytes, manifest says 192. Choose another checkpoint\n"


def test_prune_leaves_an_attempt_that_may_still_be_committed(storage: ObjectStorage) -> None:
    save(storage, "step-1", "good")
    put(storage, "step-1/late/rank-00000.bin")
    assert not main(["ckpt", "prune", storage.location, "--keep-last", "1", "--unfinished", "--yes"])
    assert storage.names("step-1") == ["good/", "late/", MANIFEST]


# -- requests that are executed after they were given up


@pytest.fixture
def hasty(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    """Storage that gives a request up at once."""
    monkeypatch.setattr(storage._client, "patience", replace(HASTY, retry=0.0))
    return storage


def give_up(storage: ObjectStorage, server: ObjectServer, attempt: str) -> None:
    """Save step 1, but the answer to the PUT of the manifest does not come."""
    put(storage, f"step-1/{attempt}/rank-00000.bin", attempt.encode())
    server.faults = [Fault(f"PUT .*{MANIFEST}", "late", times=9)]
    with pytest.raises(ConnectionResetError):
        storage.publish("step-1", attempt, manifest_of(attempt))
    server.faults = []
    storage.discard("step-1", attempt)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_manifest_that_arrives_after_its_save_was_given_up_commits_it(
    hasty: ObjectStorage, server: ObjectServer, is_first: bool
) -> None:
    if not is_first:
        save(hasty, "step-1", "old")
        give_up(hasty, server, "new")
        SaveFolder(hasty).tidy()  # a next run leaves the files there, since the manifest may be on its way
        assert hasty.read(f"step-1/{MANIFEST}", 99) == manifest_of("old")
    else:
        give_up(hasty, server, "new")
    assert server.deliver()[0] == 200
    assert hasty.read(f"step-1/{MANIFEST}", 99) == manifest_of("new")
    assert hasty.read("step-1/new/rank-00000.bin", 9) == b"new"
    assert [(entry.name, entry.is_committed) for entry in find_checkpoints(hasty)] == [("step-1", True)]


def test_files_beside_a_checkpoint_are_deleted_when_no_request_can_commit_them_any_more(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(storage, "step-1", "good")
    put(storage, "step-1/bad/rank-00000.bin")
    SaveFolder(storage).tidy()
    assert storage.names("step-1") == ["bad/", "good/", MANIFEST]
    monkeypatch.setattr(object_storage, "LATEST_REQUEST", -1.0)
    SaveFolder(storage).tidy()
    assert storage.names("step-1") == ["good/", MANIFEST]


def test_a_manifest_that_arrives_when_its_files_are_gone_is_no_checkpoint(
    hasty: ObjectStorage, server: ObjectServer, caplog: pytest.LogCaptureFixture
) -> None:
    give_up(hasty, server, "a")
    assert SaveFolder(hasty).tidy() == []
    assert server.deliver()[0] == 200
    assert hasty.names("step-1") == [MANIFEST]
    assert SaveFolder(hasty, keep_last=1).to_delete(1) == ()
    caplog.clear()
    assert SaveFolder(hasty).candidates() == []
    assert "ignored unfinished checkpoint step-1 in " in caplog.text
    save(hasty, "step-2", "b")
    assert SaveFolder(hasty).tidy() == ["step-2"]
    assert hasty.names() == ["step-2/"]


def test_a_late_manifest_does_not_block_the_next_save_by_the_owner(hasty: ObjectStorage, server: ObjectServer) -> None:
    give_up(hasty, server, "late")
    put(hasty, "step-1/new/rank-00000.bin", b"new")
    server.faults = [Fault(f"HEAD .*{MANIFEST}", "then", action=server.deliver)]
    checks: list[int] = []
    hasty.publish("step-1", "new", manifest_of("new"), lambda: checks.append(1))
    assert hasty.read(f"step-1/{MANIFEST}", 99) == manifest_of("new")
    assert hasty.names("step-1") == [MANIFEST, "new/"]
    assert len(checks) == 2  # it still owns the folder


def test_a_run_that_was_stopped_does_not_replace_what_the_next_owner_saved(storage: ObjectStorage) -> None:
    """The next owner takes the folder over while this run is stopped right after it has renewed its lease."""
    put(storage, "step-1/mine/rank-00000.bin")
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) > 1:
            raise CheckpointError("another run took it over")
        save(storage, "step-1", "others")

    with pytest.raises(CheckpointError, match="another run took it over"):
        storage.publish("step-1", "mine", manifest_of("mine"), check)
    assert storage.read(f"step-1/{MANIFEST}", 99) == manifest_of("others")


def test_an_attempt_is_not_deleted_if_a_listing_does_not_show_its_manifest_yet(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(storage, "step-1", "good")
    names = ObjectStorage.names

    def outdated(self: ObjectStorage, folder: str = "") -> list[str]:
        return [name for name in names(self, folder) if name != MANIFEST]

    monkeypatch.setattr(ObjectStorage, "names", outdated)
    assert storage.leftovers() == {}


# -- what killed processes leave


def test_parts_of_files_are_removed_at_the_start_whatever_became_of_their_attempt(storage: ObjectStorage) -> None:
    begun = ["step-1/good/rank-00001.bin", "step-2/gone/rank-00000.bin", "snapshot-0/x/rank-00000.bin"]
    of_another_folder = "other-run/step-1/good/rank-00001.bin"
    for name in (*begun, of_another_folder):
        storage.create(name).write(memoryview(bytes(PART)))
    save(storage, "step-1", "good")
    assert storage.leftovers() == {"step-2/gone": "step-2", "snapshot-0/x": "snapshot-0"}
    SaveFolder(storage).tidy()
    assert [key[len(storage._prefix) :] for key, _ in storage._uploads(storage._prefix)] == [of_another_folder]
    assert storage.names() == ["step-1/"]


def test_what_checks_wrote_is_removed_at_the_start(storage: ObjectStorage) -> None:
    for name in (partial_name("writable"), partial_name("shared"), "notes", ".notes"):
        storage.write(name, b"")
    SaveFolder(storage).tidy()
    assert storage.names() == [".notes", "notes"]


def test_a_checkpoint_that_a_run_commits_while_prune_waits_for_it_is_kept(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(storage, "step-1/a/rank-00000.bin")
    acquire = Lease.acquire

    def committed_meanwhile(*args: Any) -> Lease:
        storage.publish("step-1", "a", manifest_of("a"))
        return acquire(*args)

    monkeypatch.setattr(Lease, "acquire", committed_meanwhile)
    assert not main(["ckpt", "prune", storage.location, "--keep-last", "1", "--unfinished", "--yes"])
    assert storage.names("step-1") == ["a/", MANIFEST]
