"""Files in an object store: what is sent and read, in how much memory, and by which clock they age."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress

import pytest

from internlm.checkpoint import locations, object_files, object_storage
from internlm.checkpoint.folder_checks import check_space
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.config.schema.fields import ObjectAddress
from tests.harness.object_server import BUCKET, Fault, ObjectServer
from tests.unit.checkpoint.stores import HASTY, PART, put


@pytest.fixture
def storage(objects: ObjectStorage) -> ObjectStorage:
    return objects


def count(server: ObjectServer, method: str) -> int:
    return sum(request.startswith(f"{method} ") for request in server.requests)


def test_it_is_opened_by_its_address(server: ObjectServer) -> None:
    storage = locations.open_storage(f"boto3:s3://{BUCKET}/opened/by/address/")
    assert storage.location == f"s3://{BUCKET}/opened/by/address"
    storage.prepare()
    storage.write("note", b"x")
    assert locations.open_storage(f"s3://{BUCKET}").names("opened/by/address") == ["note"]
    assert storage.path("a/b") == f"s3://{BUCKET}/opened/by/address/a/b"
    assert storage.free_bytes() is None


def test_memory_does_not_grow_with_the_size_of_an_object(
    storage: ObjectStorage, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 1 << 20)
    # The proxy is in this process, and would count.
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.direct)
    storage = ObjectStorage(ObjectAddress(BUCKET, "memory"), HASTY)
    storage.prepare()
    data = memoryview(bytes(1 << 18))
    tracemalloc.start()
    try:
        with storage.create("large") as sink:
            for _ in range(96):
                sink.write(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert storage.open("large").size == 24 << 20
    assert peak < 6 << 20  # five parts, and what a request needs


def test_an_abandoned_object_does_not_exist_and_leaves_no_parts(storage: ObjectStorage) -> None:
    for size in (10, 5 * PART):
        with suppress(KeyError), storage.create("step-1/a/rank-00000.bin") as sink:
            sink.write(memoryview(bytes(size)))
            raise KeyError
    assert storage.names() == []
    assert storage.leftovers() == {}


def test_a_listing_of_several_pages_is_complete(
    storage: ObjectStorage, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "_KEYS_PER_REQUEST", 2)
    names = ["a", "b", "c/d", "c/e", "c/f", "g", "h"]
    for name in names:
        storage.write(f"many/{name}", b"")
    server.requests.clear()
    assert storage.names("many") == ["a", "b", "c/", "g", "h"]
    assert count(server, "GET") == 3
    storage.remove("many")
    assert storage.names() == []


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(storage: ObjectStorage) -> None:
    put(storage, "a", b"old content")
    source = storage.open("a")
    put(storage, "a", b"new content")
    with pytest.raises(OSError, match="was replaced while it was read"):
        source.read_into(0, memoryview(bytearray(3)))


def test_the_age_is_told_by_the_clock_of_the_store(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    put(storage, "lease.json")
    assert abs(storage.written("lease.json") - time.time()) < 5
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= storage.age("lease.json") < 5
    time.sleep(1.1)
    assert 1 <= storage.age("lease.json") < 6


def test_another_process_that_swaps_in_between_wins(storage: ObjectStorage, server: ObjectServer) -> None:
    storage.write("lease.json", b"old")
    server.faults = [Fault("GET .*lease.json", "then", action=lambda: storage.write("lease.json", b"another's"))]
    assert not storage.compare_and_swap("lease.json", b"old", b"mine")
    assert storage.read("lease.json", 9) == b"another's"


def test_space_is_not_limited(storage: ObjectStorage) -> None:
    check_space(storage, 1 << 60)
