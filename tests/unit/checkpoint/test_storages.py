"""What every storage does, on a file system and in an object store."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.storage import COMPARED_BYTES, MANIFEST, Storage
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.stores import PART, manifest_of, put, save

ALLOWED_NAMES = ["state.json", "step-40/rank-00000.bin", "a/b/c", "..a", "a..b", "...", "a b"]
REFUSED_NAMES = ["..", "../a", "a/../b", "a/..", "/etc/passwd", "a//b", "./a", "a\0b"]


@pytest.fixture(params=["file system", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    storage: Storage
    if request.param == "object store":
        storage = request.getfixturevalue("objects")
    else:
        storage = LocalStorage(tmp_path / "ckpts")
    storage.prepare()
    return storage


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 5 * PART, 5 * PART + 7])
def test_a_file_is_read_as_it_was_written_in_pieces(storage: Storage, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    with storage.create("step-1/a/rank-00000.bin") as sink:
        for start in range(0, size, 300):
            sink.write(memoryview(content)[start : min(start + 300, size)])
    assert storage.read("step-1/a/rank-00000.bin", size) == content[:size]
    source = storage.open("step-1/a/rank-00000.bin")
    assert source.size == size
    buffer = bytearray(500)
    assert source.read_into(size // 2, memoryview(buffer)) == min(500, size - size // 2)
    assert buffer[: size - size // 2] == content[size // 2 : size][:500]
    assert source.read_into(size, memoryview(buffer)) == 0
    source.close()


def test_names_are_sorted_and_those_of_folders_end_with_a_slash(storage: Storage) -> None:
    before = storage.names()
    for name in ("step-2/b", "step-2/a", "step-10/a", "note"):
        put(storage, name)
        assert name.partition("/")[0] in [found.rstrip("/") for found in storage.names()]
    assert storage.names() == [*before, "note", "step-10/", "step-2/"]
    assert storage.names("step-2") == ["a", "b"]
    assert storage.names("step-2/none") == storage.names("none") == []


@pytest.mark.parametrize("name", ALLOWED_NAMES)
def test_names_inside_the_folder_are_used_as_they_are(storage: Storage, name: str) -> None:
    put(storage, name)
    folder, _, file = name.rpartition("/")
    assert file in storage.names(folder)
    assert storage.read(name, 99) == b"content"


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_names_that_lead_out_of_the_folder_are_refused(storage: Storage, name: str) -> None:
    operations: list[Callable[[], Any]] = [
        lambda: storage.open(name),
        lambda: storage.create(name),
        lambda: storage.write(name, b"x"),
        lambda: storage.age(name),
        lambda: storage.names(name),
        lambda: storage.publish(name, "x", b""),
        lambda: storage.withdraw(name, "x"),
        lambda: storage.compare_and_swap(name, None, b"x"),
        lambda: storage.remove(name),
    ]
    for operation in operations:
        with pytest.raises(OSError, match="expected a name inside the folder") as caught:
            operation()
        assert caught.value.errno == errno.EINVAL


def test_a_file_that_is_missing_is_named(storage: Storage) -> None:
    for operation in (lambda: storage.read("none", 9), lambda: storage.open("none"), lambda: storage.age("none")):
        with pytest.raises(FileNotFoundError) as caught:
            operation()
        assert caught.value.filename == storage.path("none")


def test_a_file_larger_than_the_limit_is_refused(storage: Storage) -> None:
    put(storage, "large", bytes(1000))
    with pytest.raises(OSError, match="expected at most 100 bytes, got 1000") as caught:
        storage.read("large", limit=100)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, storage.path("large"))


def test_content_is_swapped_only_if_it_is_the_expected_one(storage: Storage) -> None:
    assert not storage.compare_and_swap("lease.json", b"a", b"b")
    assert storage.compare_and_swap("lease.json", None, b"a")
    assert not storage.compare_and_swap("lease.json", None, b"b")
    assert not storage.compare_and_swap("lease.json", b"b", b"c")
    assert storage.compare_and_swap("lease.json", b"a", b"b")
    assert storage.read("lease.json", 9) == b"b"
    assert storage.compare_and_swap("lease.json", b"b", None)
    assert storage.compare_and_swap("lease.json", None, None)
    assert not storage.compare_and_swap("lease.json", b"b", b"c")
    assert storage.compare_and_swap("lease.json", None, b"d")


def test_a_file_that_is_too_large_to_compare_can_be_swapped_by_its_beginning(storage: Storage) -> None:
    put(storage, "lease.json", b"x" * COMPARED_BYTES + b"y")
    assert not storage.compare_and_swap("lease.json", b"x", b"new")
    assert storage.compare_and_swap("lease.json", b"x" * COMPARED_BYTES, b"new")


def test_of_many_threads_one_swaps(storage: Storage) -> None:
    with ThreadPoolExecutor(6) as pool:
        for attempt in range(5):
            start = threading.Barrier(6)

            def compete(index: int, name: str = f"lease-{attempt}", start: threading.Barrier = start) -> bool:
                start.wait()
                return storage.compare_and_swap(name, None, b"%d" % index)

            won = list(pool.map(compete, range(6)))
            assert won.count(True) == 1
            assert storage.read(f"lease-{attempt}", 9) == b"%d" % won.index(True)


def test_an_attempt_becomes_a_checkpoint_and_replaces_an_older_one(storage: Storage) -> None:
    for attempt in ("a1", "b2"):
        save(storage, "step-40", attempt)
        assert storage.read(f"step-40/{MANIFEST}", 99) == manifest_of(attempt)
        (file,) = {*_files(storage, "step-40")} - {f"step-40/{MANIFEST}"}
        assert storage.read(file, 9) == attempt.encode()
    assert storage.leftovers() == {}


def test_a_run_that_does_not_own_the_folder_any_more_commits_nothing(storage: Storage) -> None:
    def check() -> None:
        raise CheckpointError("another run took it over")

    save(storage, "step-40", "a1")
    for checkpoint in ("step-40", "step-41"):
        put(storage, f"{storage.attempt_folder(checkpoint, 'b2')}/rank-00000.bin")
        with pytest.raises(CheckpointError, match="another run took it over"):
            storage.publish(checkpoint, "b2", manifest_of("b2"), check)
        storage.discard(checkpoint, "b2")
    assert storage.read(f"step-40/{MANIFEST}", 99) == manifest_of("a1")
    assert [name for name in storage.names() if name.startswith("step-")] == ["step-40/"]
    assert storage.leftovers() == {}


def test_a_deleted_checkpoint_is_gone_and_cannot_be_deleted_again(storage: Storage) -> None:
    before = storage.names()
    save(storage, "step-40", "a")
    storage.withdraw("step-40", "b")
    assert storage.names() == before
    with pytest.raises(FileNotFoundError):
        storage.withdraw("step-40", "c")
    storage.remove("step-40")


def _files(storage: Storage, folder: str) -> list[str]:
    """Return the names of all files below a folder."""
    found = []
    for name in storage.names(folder):
        found += _files(storage, f"{folder}/{name[:-1]}") if name.endswith("/") else [f"{folder}/{name}"]
    return found
