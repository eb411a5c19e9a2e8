"""Storage on a file system: every operation, what it refuses to follow, and what a crash leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm.checkpoint import local_storage
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.storage import COMPARED_BYTES, MANIFEST

ALLOWED_NAMES = ["state.json", "step-40/rank-00000.bin", "a/b/c", "..a", "a..b", "...", "a b"]
NOBODY = 65534
REFUSED_NAMES = ["..", "../a", "a/../b", "a/..", "/etc/passwd", "a//b", "a/", "./a", "a\0b"]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    made = LocalStorage(tmp_path / "ckpts")
    made.prepare()
    return made


def put(storage: LocalStorage, name: str, content: bytes = b"content") -> None:
    with storage.create(name) as sink:
        sink.write(memoryview(content))


def save(storage: LocalStorage, checkpoint: str, attempt: str, content: bytes) -> None:
    put(storage, f"{storage.attempt_folder(checkpoint, attempt)}/rank-00000.bin", content)
    storage.publish(checkpoint, attempt, b"manifest of " + content)


def files(root: Path) -> dict[str, bytes]:
    """Content by name of all regular files but the lock."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != local_storage.LOCK)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


# -- files


def test_the_folder_is_created_with_those_around_it_and_is_empty(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "a/b/c")
    assert storage.names() == []
    storage.prepare()
    storage.prepare()
    assert storage.names() == []
    assert (tmp_path / "a/b/c").is_dir()


def test_a_file_is_read_as_it_was_written_in_pieces(storage: LocalStorage) -> None:
    with storage.create("step-1/rank-00000.bin") as sink:
        sink.write(memoryview(b"abc"))
        sink.write(memoryview(b""))
        sink.write(memoryview(b"defgh"))
    source = storage.open("step-1/rank-00000.bin")
    assert source.size == 8
    buffer = bytearray(b"------")
    assert source.read_into(2, memoryview(buffer)) == 6
    assert buffer == b"cdefgh"
    assert source.read_into(6, memoryview(buffer)) == 2
    assert buffer == b"ghefgh"
    assert source.read_into(8, memoryview(buffer)) == 0
    source.close()
    assert storage.read("step-1/rank-00000.bin", limit=8) == b"abcdefgh"


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
    assert files(storage.root) == {"a/state.json": b"new"}


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


@pytest.mark.parametrize("name", ALLOWED_NAMES)
def test_names_inside_the_folder_are_used_as_they_are(storage: LocalStorage, name: str) -> None:
    put(storage, name)
    assert files(storage.root) == {name: b"content"}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_names_that_lead_out_of_the_folder_are_refused(storage: LocalStorage, name: str) -> None:
    (storage.root.parent / "a").write_text("outside")
    before = files(storage.root.parent)
    operations: list[Callable[[], Any]] = [
        lambda: storage.open(name),
        lambda: storage.create(name),
        lambda: storage.write(name, b"x"),
        lambda: storage.age(name),
        lambda: storage.names(name),
        lambda: storage.publish(name, "x", b""),
        lambda: storage.withdraw(name, "x"),
        lambda: storage.compare_and_swap(name, None, b"x"),
    ]
    if not name.endswith("/"):  # names of folders come with a slash
        operations.append(lambda: storage.remove(name))
    for operation in operations:
        with pytest.raises(OSError, match="expected a name inside the folder") as caught:
            operation()
        assert caught.value.errno == errno.EINVAL
    assert files(storage.root.parent) == before


# -- links, pipes, permissions


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
    assert files(outside) == {"state.json": b"secret"}
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
    save(storage, "step-1", "a", b"other")
    (storage.root / "step-2").symlink_to("step-1")
    if operation == "publish":
        save(storage, "step-2", "b", b"new")
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
    assert files(storage.root) == {"keep/file": b"content"}
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


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Folder in which the test runs as a user who may not write everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        user = os.geteuid()
        if user == 0:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


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
    assert files(storage.root) == {"state.json": b"old"}


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
    storage.prepare()
    assert storage.names() == [
        local_storage.LOCK,
        ".other.partial",
        ".state.json.partial-01234567",
        "a.partial-01234567",
    ]


# -- compare and swap, age


def test_content_is_swapped_only_if_it_is_the_expected_one(storage: LocalStorage) -> None:
    assert not storage.compare_and_swap("lease.json", b"a", b"b")
    assert storage.compare_and_swap("lease.json", None, b"a")
    assert not storage.compare_and_swap("lease.json", None, b"b")
    assert not storage.compare_and_swap("lease.json", b"b", b"c")
    assert storage.compare_and_swap("lease.json", b"a", b"b")
    assert storage.read("lease.json", 9) == b"b"
    assert storage.compare_and_swap("lease.json", b"b", None)
    assert storage.compare_and_swap("lease.json", None, None)
    assert files(storage.root) == {}


def test_a_file_that_is_too_large_to_compare_can_be_swapped_by_its_beginning(storage: LocalStorage) -> None:
    put(storage, "lease.json", b"x" * COMPARED_BYTES + b"y")
    assert not storage.compare_and_swap("lease.json", b"x", b"new")
    assert storage.compare_and_swap("lease.json", b"x" * COMPARED_BYTES, b"new")


def test_of_many_threads_one_swaps(storage: LocalStorage) -> None:
    for attempt in range(20):
        name, start, won = f"lease-{attempt}", threading.Barrier(8), []

        def compete(index: int, name: str = name, start: threading.Barrier = start, won: list[int] = won) -> None:
            start.wait()
            if storage.compare_and_swap(name, None, b"%d" % index):
                won.append(index)

        threads = [threading.Thread(target=compete, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read(name, 9) == b"%d" % won[0]


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


# -- checkpoints


def test_an_attempt_becomes_a_checkpoint_and_replaces_an_older_one(storage: LocalStorage) -> None:
    save(storage, "step-40", "a1", b"old")
    save(storage, "step-40", "b2", b"new")
    assert files(storage.root) == {f"step-40/{MANIFEST}": b"manifest of new", "step-40/rank-00000.bin": b"new"}
    assert storage.leftovers() == {}
    assert (storage.free_bytes() or 0) > 0


def test_an_attempt_that_another_run_has_removed_is_not_published(storage: LocalStorage) -> None:
    """As after the owner of the folder was stopped: without its files it would replace the older checkpoint."""
    save(storage, "step-40", "a1", b"old")
    put(storage, f"{storage.attempt_folder('step-40', 'b2')}/rank-00000.bin", b"new")
    storage.remove(storage.attempt_folder("step-40", "b2"))
    with pytest.raises(FileNotFoundError):
        storage.publish("step-40", "b2", b"manifest of new")
    assert files(storage.root) == {f"step-40/{MANIFEST}": b"manifest of old", "step-40/rank-00000.bin": b"old"}


def test_a_deleted_checkpoint_is_gone_and_cannot_be_deleted_again(storage: LocalStorage) -> None:
    save(storage, "step-40", "a", b"x")
    storage.withdraw("step-40", "b")
    assert storage.names() == []
    with pytest.raises(FileNotFoundError):
        storage.withdraw("step-40", "c")
    storage.remove("step-40")


def test_leftovers_are_folders_named_after_a_checkpoint_and_nothing_of_the_user(storage: LocalStorage) -> None:
    left = {"step-40.tmp-a1": "step-40", "step-7.replaced-b": "step-7", "snapshot-0.deleting-0f": "snapshot-0"}
    for name in (
        *left,
        "notes.tmp-old",
        "step-40",
        "step-x.tmp-a",
        "step-40.tmp-",
        "step-40.tmp-a.b",
        "my-step-1.tmp-a",
    ):
        (storage.root / name).mkdir()
    (storage.root / "step-9.tmp-a").write_text("a file")
    (storage.root / "step-8.tmp-a").symlink_to("step-40")
    assert storage.leftovers() == left


def test_a_save_that_cannot_be_renamed_into_place_leaves_the_old_one_there(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(storage, "step-40", "a", b"old")
    rename = os.rename

    def failing(old: str, new: str, **folders: int) -> None:
        if ".tmp-" in old:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), old)
        rename(old, new, **folders)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
        save(storage, "step-40", "b", b"new")
    assert storage.read("step-40/rank-00000.bin", 9) == b"old"


class Crash(BaseException):
    """The process ends before a call of the operating system; no handler of errors runs."""


CHANGES = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "utime")


def crashes(monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], Callable[[], None]]) -> Iterator[int]:
    """Run an operation until it succeeds, each time crashing one system call later; yield after each crash."""
    for last in range(1, 200):
        operation, done = prepare(), 0

        def counting(call: Callable[..., Any], last: int = last) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal done
                done += 1
                if done == last:
                    raise Crash
                return call(*args, **options)

            return counted

        with monkeypatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, counting(getattr(os, name)))
            try:
                operation()
            except Crash:
                pass
            else:
                assert last > 3
                return
        yield last


def committed(storage: LocalStorage, checkpoint: str) -> bytes | None:
    """Content that a loader would find: of the checkpoint, or of one that an uncommitted save was about to replace."""
    names = [checkpoint, *(name for name in storage.leftovers() if ".replaced-" in name)]
    for name in names:
        if f"{name}/" in storage.names():
            content = storage.read(f"{name}/rank-00000.bin", 99)
            assert storage.read(f"{name}/{MANIFEST}", 99) == b"manifest of " + content
            return content
    return None


def test_a_crash_at_any_system_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)

    def prepare() -> Callable[[], None]:
        for name in storage.names():
            storage.remove(name)
        save(storage, "step-40", "a", b"old")
        return lambda: save(storage, "step-40", "b", b"new")

    seen = [committed(storage, "step-40") for _ in crashes(monkeypatch, prepare)]
    assert set(seen) == {b"old", b"new"}
    assert sorted(seen, reverse=True) == seen
    assert committed(storage, "step-40") == b"new"


def test_a_crash_at_any_system_call_of_a_deletion_leaves_the_checkpoint_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)

    def prepare() -> Callable[[], None]:
        for name in storage.names():
            storage.remove(name)
        save(storage, "step-40", "a", b"x")
        return lambda: storage.withdraw("step-40", "b")

    assert {committed(storage, "step-40") for _ in crashes(monkeypatch, prepare)} == {b"x", None}


def test_a_crash_at_any_system_call_of_a_swap_leaves_the_old_or_the_new_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)

    def prepare() -> Callable[[], None]:
        storage.write("lease.json", b"old")
        return lambda: bool(storage.compare_and_swap("lease.json", b"old", b"new")) or None

    seen = [storage.read("lease.json", 9) for _ in crashes(monkeypatch, prepare)]
    assert set(seen) == {b"old", b"new"}
