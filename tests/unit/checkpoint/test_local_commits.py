"""Commits on a file system: what a save replaces, and what a crash at any system call leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.storage import MANIFEST
from tests.unit.checkpoint.stores import files_of, put, save_content


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    made = LocalStorage(tmp_path / "ckpts")
    made.prepare()
    return made


def test_an_attempt_that_another_run_has_removed_is_not_published(storage: LocalStorage) -> None:
    """As after the owner of the folder was stopped: without its files it would replace the older checkpoint."""
    save_content(storage, "step-40", "a1", b"old")
    put(storage, f"{storage.attempt_folder('step-40', 'b2')}/rank-00000.bin", b"new")
    storage.remove(storage.attempt_folder("step-40", "b2"))
    with pytest.raises(FileNotFoundError):
        storage.publish("step-40", "b2", b"manifest of new")
    assert files_of(storage.root) == {f"step-40/{MANIFEST}": b"manifest of old", "step-40/rank-00000.bin": b"old"}


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
    save_content(storage, "step-40", "a", b"old")
    rename = os.rename

    def failing(old: str, new: str, **folders: int) -> None:
        if ".tmp-" in old:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), old)
        rename(old, new, **folders)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
        save_content(storage, "step-40", "b", b"new")
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
        save_content(storage, "step-40", "a", b"old")
        return lambda: save_content(storage, "step-40", "b", b"new")

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
        save_content(storage, "step-40", "a", b"x")
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
