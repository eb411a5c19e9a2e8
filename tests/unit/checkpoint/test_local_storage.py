"""Storage on a file system: every operation, and what it refuses to follow."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from internlm.checkpoint import local_storage
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.storage import MANIFEST
from tests.unit.checkpoint.stores import files_of, put, save_content


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    made = LocalStorage(tmp_path / "ckpts")
    made.prepare()
    return made


def test_the_folder_is_created_with_those_around_it_and_is_empty(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "a/b/c")
    assert storage.names() == []
    storage.prepare()
    storage.prepare()
    assert storage.names() == []
    assert (tmp_path / "a/b/c").is_dir()


def test_names_are_sorted_and_those_of_folders_end_with_a_slash(storage: LocalStorage) -> None:
    for name in ("step-2/b", "step-2/a", "step-10/a", "note"):
        put(storage, name)
    (storage.root / "step-3").symlink_to("step-2")
    assert storage.names() == ["note", "step-10/", "step-2/", "step-3"]
    assert storage.names("step-2") == ["a", "b"]
    assert storage.names("step-2/none") == storage.names("none") == []


def test_a_small_file_is_replaced_and_leaves_nothing_beside_it(storage: LocalStorage) -> None:
    storage.write("a/state.json", b"old")
    storage.write("a/state.json", b"new")
    assert files_of(storage.root) == {"a/state.json": b"new"}


def test_a_file_that_is_missing_is_named(storage: LocalStorage) -> None:
    for name in ("none", "none/none"):
        with pytest.raises(FileNotFoundError) as caught:
            storage.open(name)
        assert caught.value.filename in (storage.path("none"), storage.path(name))
    with pytest.raises(FileNotFoundError):
        storage.read("none", 1)
    for time_of in (storage.age, storage.written):
        with pytest.raises(FileNotFoundError):
            time_of("none")


def test_the_time_of_a_file_is_read_without_writing(storage: LocalStorage) -> None:
    put(storage, "note")
    os.utime(storage.path("note"), (1e9, 1e9))
    assert storage.written("note") == 1e9
    assert storage.names() == ["note"]


def test_a_file_larger_than_the_limit_is_refused_before_memory_is_allocated(storage: LocalStorage) -> None:
    put(storage, "huge")
    os.truncate(storage.path("huge"), 1 << 42)
    with pytest.raises(OSError, match="expected at most 100 bytes, got 4398046511104") as caught:
        storage.read("huge", limit=100)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == storage.path("huge")


def test_links_are_never_followed(storage: LocalStorage) -> None:
    outside = storage.root.parent / "outside"
    outside.mkdir()
    (outside / "state.json").write_text("secret")
    (storage.root / "step-1").symlink_to(outside)
    put(storage, "step-2/rank-00000.bin")
    (storage.root / "step-2/state.json").symlink_to(outside / "state.json")
    (storage.root / "step-2/dangling").symlink_to(outside / "none")
    for name in ("step-1/state.json", "step-1/new", "step-2/state.json", "step-2/dangling"):
        for operation in (storage.open, storage.create):
            with pytest.raises(OSError, match="is a symbolic link, which is not followed") as caught:
                operation(name)
            assert caught.value.filename == storage.path("step-1" if "step-1" in name else name)
    with pytest.raises(OSError, match="is a symbolic link"):
        storage.names("step-1")
    with pytest.raises(OSError, match="is a symbolic link"):
        storage.write("step-1/state.json", b"x")
    storage.write("step-2/state.json", b"x")  # replaces the link
    assert files_of(outside) == {"state.json": b"secret"}
    assert storage.read("step-2/state.json", 1) == b"x"


def test_the_folder_itself_may_be_a_link(storage: LocalStorage) -> None:
    put(storage, "note")
    link = storage.root.parent / "link"
    link.symlink_to(storage.root)
    assert LocalStorage(link).read("note", 10) == b"content"


@pytest.mark.parametrize("operation", ["publish", "withdraw", "remove"])
def test_a_checkpoint_that_is_a_link_is_replaced_or_removed_and_its_target_is_untouched(
    storage: LocalStorage, operation: str
) -> None:
    save_content(storage, "step-1", "a", b"other")
    (storage.root / "step-2").symlink_to("step-1")
    if operation == "publish":
        save_content(storage, "step-2", "b", b"new")
    else:
        {"withdraw": lambda: storage.withdraw("step-2", "b"), "remove": lambda: storage.remove("step-2")}[operation]()
    assert not (storage.root / "step-2").is_symlink()
    assert storage.names() == (["step-1/", "step-2/"] if operation == "publish" else ["step-1/"])
    assert storage.read("step-1/rank-00000.bin", 10) == b"other"
    assert storage.read(f"step-1/{MANIFEST}", 20) == b"manifest of other"


def test_links_inside_a_removed_folder_are_removed_and_not_followed(storage: LocalStorage) -> None:
    put(storage, "keep/file")
    put(storage, "step-1/file")
    (storage.root / "step-1/folder").symlink_to("../keep")
    (storage.root / "step-1/file2").symlink_to("../keep/file")
    storage.remove("step-1/")
    assert files_of(storage.root) == {"keep/file": b"content"}
    assert storage.names() == ["keep/"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(storage: LocalStorage, kind: str) -> None:
    path = storage.root / "state.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mknod(path, 0o140644)
    for operation in (storage.open, storage.create):
        with pytest.raises(OSError, match=r"expected a regular file|No such device|Is a directory") as caught:
            operation("state.json")
        assert caught.value.filename == storage.path("state.json")


def test_a_folder_without_write_permission_is_found_at_the_start(unprivileged: Path) -> None:
    storage = LocalStorage(unprivileged / "ckpts")
    storage.prepare()
    storage.root.chmod(0o500)
    with pytest.raises(PermissionError) as caught:
        storage.prepare()
    assert str(caught.value.filename).startswith(storage.path(".writable.partial-"))
    storage.root.chmod(0o700)
    (storage.root / "step-1").mkdir(mode=0o500)
    with pytest.raises(PermissionError) as caught:
        storage.create("step-1/x")
    assert caught.value.filename == storage.path("step-1/x")


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/inner"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            LocalStorage(tmp_path / folder).prepare()


def test_a_full_disk_is_reported_with_the_file_and_leaves_no_part_of_a_small_one(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("state.json", b"old")

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write("state.json", b"new")
    assert str(caught.value.filename).startswith(storage.path(".state.json.partial-"))
    assert files_of(storage.root) == {"state.json": b"old"}


def test_partial_files_of_dead_processes_are_removed_at_the_start(storage: LocalStorage) -> None:
    for name in (
        ".state.json.partial-01234567",
        ".lease.json.partial-89abcdef",
        ".other.partial",
        "a.partial-01234567",
    ):
        (storage.root / name).write_text("")
        if "state" not in name:
            os.utime(storage.root / name, (0, 0))
    storage.sweep()
    assert storage.names() == [
        local_storage.LOCK,
        ".other.partial",
        ".state.json.partial-01234567",
        "a.partial-01234567",
    ]


def test_the_wait_for_a_lock_that_a_stopped_process_holds_is_bounded(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.compare_and_swap("lease.json", None, b"a")
    monkeypatch.setattr(local_storage, "_LOCK_SECONDS", 0.2)
    with open(storage.root / local_storage.LOCK) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="another process has held its lock") as caught:
            storage.compare_and_swap("lease.json", b"a", b"b")
        assert time.monotonic() - started < 5
    assert caught.value.filename == storage.path(local_storage.LOCK)
    assert storage.compare_and_swap("lease.json", b"a", b"b")


def test_without_locks_the_last_of_those_that_compete_wins(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlocked(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unlocked)
    monkeypatch.setattr(local_storage, "_SETTLE_SECONDS", 0.3)
    assert storage.compare_and_swap("lease.json", None, b"a")
    assert not storage.compare_and_swap("lease.json", None, b"b")
    monkeypatch.setattr(time, "sleep", lambda seconds: storage.write("lease.json", b"another's"))
    assert not storage.compare_and_swap("lease.json", b"a", b"b")


def test_the_age_is_told_by_the_clock_of_the_file_system(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(storage, "lease.json")
    assert -0.1 < storage.age("lease.json") < 5
    os.utime(storage.root / "lease.json", (time.time() - 100,) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this host's clock plays no part
    assert 99 < storage.age("lease.json") < 105
