"""Storage in an object store, against a server of the S3 protocol whose answers are delayed, cut and lost."""

from __future__ import annotations

import copy
import errno
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from internlm.checkpoint import locations, object_files, object_storage
from internlm.checkpoint.folder_checks import check_space
from internlm.checkpoint.lease import LEASE_FILE, Lease, LeaseTimes, this_owner, to_bytes
from internlm.checkpoint.object_client import Patience
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.checkpoint.storage import COMPARED_BYTES, MANIFEST
from internlm.cli.main import main
from internlm.config.schema.fields import ObjectAddress
from internlm.utils import lazy
from internlm.utils.errors import CheckpointError, UserError
from tests.harness.object_server import BUCKET, SECRET, Fault, ObjectServer, environment, object_server
from tests.unit.checkpoint.samples import in_ranges, save_to

HASTY = Patience(connect=5.0, silence=5.0, request=10.0, retry=10.0, first_delay=0.01, longest_delay=0.05)
SHORT = replace(HASTY, connect=0.5, silence=0.5, retry=1.5)
PART = 1000


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


@pytest.fixture
def server(running: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    running.faults, running.requests, running.silence = [], [], 1.0
    for name, value in environment(running.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(object_files, "PART_BYTES", PART)
    return running


@pytest.fixture(scope="module")
def connected(running: ObjectServer) -> ObjectStorage:
    """Storage whose client all tests share: making one takes tenths of a second."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.endpoint).items():
            patch.setenv(name, value)
        storage = ObjectStorage(ObjectAddress(BUCKET, ""), HASTY)
        storage.prepare()
    return storage


@pytest.fixture
def storage(server: ObjectServer, connected: ObjectStorage, request: pytest.FixtureRequest) -> ObjectStorage:
    # A folder of its own, so that tests share the server, but no object.
    address = ObjectAddress(BUCKET, f"runs/{abs(hash(request.node.name))}")
    own = copy.copy(connected)
    own.__dict__.update(_prefix=f"{address.prefix}/", location=f"s3://{address.bucket}/{address.prefix}")
    return own


def put(storage: ObjectStorage, name: str, content: bytes = b"content") -> None:
    with storage.create(name) as sink:
        sink.write(memoryview(content))


def manifest_of(attempt: str) -> bytes:
    return b'{"files": {"%s/rank-00000.bin": 7}}' % attempt.encode()


def save(storage: ObjectStorage, checkpoint: str, attempt: str) -> None:
    put(storage, f"{storage.attempt_folder(checkpoint, attempt)}/rank-00000.bin", attempt.encode())
    storage.publish(checkpoint, attempt, manifest_of(attempt))


def count(server: ObjectServer, method: str) -> int:
    return sum(request.startswith(f"{method} ") for request in server.requests)


# -- files


def test_it_is_opened_by_its_address(server: ObjectServer) -> None:
    storage = locations.open_storage(f"boto3:s3://{BUCKET}/opened/by/address/")
    assert storage.location == f"s3://{BUCKET}/opened/by/address"
    storage.prepare()
    storage.write("note", b"x")
    assert locations.open_storage(f"s3://{BUCKET}").names("opened/by/address") == ["note"]
    assert storage.path("a/b") == f"s3://{BUCKET}/opened/by/address/a/b"
    assert storage.free_bytes() is None


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 5 * PART, 5 * PART + 7])
def test_an_object_is_read_as_it_was_written_in_pieces(storage: ObjectStorage, size: int) -> None:
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


def test_names_are_sorted_complete_and_never_out_of_date(storage: ObjectStorage) -> None:
    assert storage.names() == storage.names("none") == []
    for name in ("step-2/b", "step-2/a", "step-10/a", "note"):
        put(storage, name)
        assert name.partition("/")[0] in [found.rstrip("/") for found in storage.names()]
    assert storage.names() == ["note", "step-10/", "step-2/"]
    assert storage.names("step-2") == storage.names("step-2/") == ["a", "b"]


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


def test_an_object_that_is_missing_or_too_large_is_named(storage: ObjectStorage) -> None:
    for operation in (lambda: storage.read("none", 9), lambda: storage.open("none"), lambda: storage.age("none")):
        with pytest.raises(FileNotFoundError, match="does not exist") as caught:
            operation()
        assert caught.value.filename == storage.path("none")
    put(storage, "large", bytes(1000))
    with pytest.raises(OSError, match="expected at most 100 bytes, got 1000") as error:
        storage.read("large", limit=100)
    assert error.value.errno == errno.EFBIG


@pytest.mark.parametrize("name", ["..", "../a", "a/../b", "/etc/passwd", "a//b", "./a"])
def test_names_that_lead_out_of_the_folder_are_refused(storage: ObjectStorage, server: ObjectServer, name: str) -> None:
    operations: list[Callable[[], Any]] = [
        lambda: storage.open(name),
        lambda: storage.create(name),
        lambda: storage.write(name, b"x"),
        lambda: storage.names(name),
        lambda: storage.publish(name, "x", b""),
        lambda: storage.withdraw(name, "x"),
        lambda: storage.compare_and_swap(name, None, b"x"),
        lambda: storage.remove(name),
    ]
    for operation in operations:
        with pytest.raises(OSError, match="expected a name inside the folder"):
            operation()
    with pytest.raises(OSError, match="expected the name of a folder"):
        storage.remove("")
    assert server.requests == []


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


# -- compare and swap


def test_content_is_swapped_only_if_it_is_the_expected_one(storage: ObjectStorage) -> None:
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
    put(storage, "huge.json", b"x" * COMPARED_BYTES + b"y")
    assert storage.compare_and_swap("huge.json", b"x" * COMPARED_BYTES, b"new")


def test_of_many_threads_one_swaps(storage: ObjectStorage) -> None:
    with ThreadPoolExecutor(6) as pool:
        for attempt in range(5):
            start = threading.Barrier(6)

            def compete(index: int, name: str = f"lease-{attempt}", start: threading.Barrier = start) -> bool:
                start.wait()
                return storage.compare_and_swap(name, None, b"%d" % index)

            won = list(pool.map(compete, range(6)))
            assert won.count(True) == 1
            assert storage.read(f"lease-{attempt}", 9) == b"%d" % won.index(True)


def test_another_process_that_swaps_in_between_wins(storage: ObjectStorage, server: ObjectServer) -> None:
    storage.write("lease.json", b"old")
    server.faults = [Fault("GET .*lease.json", "then", action=lambda: storage.write("lease.json", b"another's"))]
    assert not storage.compare_and_swap("lease.json", b"old", b"mine")
    assert storage.read("lease.json", 9) == b"another's"


# -- checkpoints


def test_an_attempt_becomes_a_checkpoint_and_replaces_an_older_one(storage: ObjectStorage) -> None:
    save(storage, "step-40", "a1")
    assert storage.names("step-40") == ["a1/", MANIFEST]
    save(storage, "step-40", "b2")
    assert storage.names("step-40") == ["b2/", MANIFEST]
    assert storage.read(f"step-40/{MANIFEST}", 99) == manifest_of("b2")
    assert storage.leftovers() == {}


def test_a_deleted_checkpoint_loses_its_manifest_first(storage: ObjectStorage, server: ObjectServer) -> None:
    save(storage, "step-40", "a")
    server.faults = [Fault(r"POST .*delete", "status", times=99, status=403, code="AccessDenied")]
    storage.withdraw("step-40", "b")
    assert storage.names("step-40") == ["a/"]
    assert storage.leftovers() == {"step-40/a": "step-40"}
    with pytest.raises(FileNotFoundError):
        storage.withdraw("step-40", "c")
    server.faults = []
    storage.remove("step-40/a")
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


def test_space_is_not_limited(storage: ObjectStorage) -> None:
    check_space(storage, 1 << 60)


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


# -- failures


FAULTS = {
    "slow down": Fault("", "status", times=2),
    "error inside": Fault("", "status", status=500, code="InternalError"),
    "conflict": Fault("", "status", status=409, code="ConditionalRequestConflict"),
    "reset": Fault("", "reset", times=2),
    "silence": Fault("", "silence"),
    "answer lost": Fault("", "lost"),
    "answer truncated": Fault("", "truncated"),
}
EVERYWHERE = ("slow down", "answer lost")
ELSEWHERE = ("GET .*/a$", "PUT .*large.*partNumber=2", "PUT .*step-1/manifest")


def _large(storage: ObjectStorage) -> None:
    put(storage, "step-1/b/large", bytes(3 * PART + 1))
    assert storage.read("step-1/b/large", 4 * PART) == bytes(3 * PART + 1)


#: Operation by the request of it that fails, in an order in which each finds what it needs.
OPERATIONS: dict[str, Callable[[ObjectStorage], object]] = {
    "PUT .*writable": lambda storage: storage.prepare(),
    "DELETE .*writable": lambda storage: storage.prepare(),
    "GET .*list-type": lambda storage: storage.names() == ["a", "step-1/"],
    "GET .*/a$": lambda storage: storage.read("a", 99) == b"content",
    "GET .*/rank-00000.bin$": lambda storage: _read_into(storage),
    "HEAD .*/a$": lambda storage: storage.open("a").size == 7,
    "PUT .*/a$": lambda storage: storage.compare_and_swap("a", b"content", b"new"),
    "PUT .*lease": lambda storage: storage.compare_and_swap("lease", None, b"new"),
    "POST .*large.uploads": _large,
    "PUT .*large.*partNumber=2": _large,
    "POST .*large.uploadId": _large,
    "PUT .*step-2/manifest": lambda storage: save(storage, "step-2", "mine"),
    "PUT .*step-1/manifest": lambda storage: save(storage, "step-1", "mine"),
    "DELETE .*manifest": lambda storage: storage.withdraw("step-1", "x"),
    "POST .*delete": lambda storage: storage.remove("step-2"),
}


def _read_into(storage: ObjectStorage) -> bool:
    buffer = bytearray(3)
    return storage.open("step-1/first/rank-00000.bin").read_into(2, memoryview(buffer)) == 3 and buffer == b"rst"


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_are_sent_again_after_a_passing_failure(
    storage: ObjectStorage, server: ObjectServer, fault: str
) -> None:
    if fault == "silence":
        storage = ObjectStorage(ObjectAddress(BUCKET, "silent"), replace(HASTY, silence=0.3))
        server.silence = 0.6
    put(storage, "a")
    save(storage, "step-1", "first")
    for request, operation in OPERATIONS.items():
        if fault not in EVERYWHERE and request not in ELSEWHERE:
            continue
        server.requests, server.faults = [], [replace(FAULTS[fault], request=request)]
        assert operation(storage) in (True, None), request
        assert server.faults[0].times == 0, f"no request matched {request}: {server.requests}"
        if "manifest" in request and request.startswith("PUT"):
            checkpoint = request[6:12]
            assert storage.read(f"{checkpoint}/{MANIFEST}", 99) == manifest_of("mine")
            assert storage.names(checkpoint) == [MANIFEST, "mine/"]


def test_a_finished_upload_whose_answer_was_lost_is_recognised(storage: ObjectStorage, server: ObjectServer) -> None:
    gone = Fault("POST .*large.uploadId", "status", status=404, code="NoSuchUpload")
    server.faults = [Fault("POST .*large.uploadId", "lost"), gone]
    _large(storage)
    assert gone.times == 0
    server.faults = [Fault("POST .*other.uploadId", "status", status=404, code="NoSuchUpload")]
    with pytest.raises(FileNotFoundError):
        put(storage, "other", bytes(3 * PART))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", errno.EACCES),
        (404, "NoSuchKey", errno.ENOENT),
        (404, "NoSuchBucket", errno.ENXIO),
        (400, "ExpiredToken", errno.EACCES),
        (507, "XMinioStorageFull", errno.ENOSPC),
        (400, "InvalidArgument", errno.EREMOTEIO),
    ],
)
def test_a_lasting_failure_is_reported_at_once(
    storage: ObjectStorage, server: ObjectServer, status: int, code: str, expected: int
) -> None:
    server.faults = [Fault("GET", "status", times=99, status=status, code=code)]
    with pytest.raises(OSError, match=rf"HTTP {status} {code} \(As the test asked.\)") as caught:
        storage.read("a", 9)
    assert (caught.value.errno, caught.value.filename) == (expected, storage.path("a"))
    assert len(server.requests) == 1


def test_a_failure_that_lasts_ends_in_time_and_says_how_often_it_was_tried(server: ObjectServer) -> None:
    storage = ObjectStorage(ObjectAddress(BUCKET, ""), SHORT)
    server.faults = [Fault("", "status", times=10_000)]
    started = time.monotonic()
    with pytest.raises(OSError, match=r"HTTP 503 SlowDown \(As the test asked.\), \d+ times in [12] s"):
        storage.names()
    assert time.monotonic() - started < SHORT.retry + 2
    # Back-off: far fewer requests than without a delay.
    assert 5 < len(server.requests) < 200


@pytest.mark.parametrize("endpoint", ["refused", "silent", "unknown"])
def test_a_dead_endpoint_ends_in_time(endpoint: str, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if endpoint == "silent":
            listener.listen()
        host = "host.invalid" if endpoint == "unknown" else "127.0.0.1"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{listener.getsockname()[1]}")
        storage = ObjectStorage(ObjectAddress(BUCKET, ""), SHORT)
        started = time.monotonic()
        message = "no answer in time" if endpoint == "silent" else "Could not connect to the endpoint"
        with pytest.raises(OSError, match=message) as caught:
            storage.read("a", 9)
        assert time.monotonic() - started < SHORT.retry + SHORT.silence + 2
    assert "\n" not in str(caught.value)
    assert f"s3://{BUCKET}/a" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "Unable to locate credentials: set AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_PROFILE": "none-such"}, "The config profile (none-such) could not be found"),
        ({"AWS_ENDPOINT_URL": "no address"}, "no address"),
        ({"AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1:1"}, "credentials encoded in URL"),
    ],
)
def test_a_wrong_environment_is_an_error_of_one_line(
    changes: dict[str, str | None], message: str, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        ObjectStorage(ObjectAddress(BUCKET, ""), HASTY).prepare()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert server.requests == []


def test_a_bucket_that_does_not_exist_is_named_at_the_start(server: ObjectServer) -> None:
    with pytest.raises(OSError, match="the bucket does not exist: create it") as caught:
        ObjectStorage(ObjectAddress("none-such", "a"), HASTY).prepare()
    assert caught.value.filename == "s3://none-such/a"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "why_missing", lambda module: "No module named 's3fs'")
    with pytest.raises(UserError, match=r"s3://bucket: needs the package 's3fs'.* Run: pip install 'InternEvo\[s3\]'"):
        locations.open_storage("s3://bucket/a")


# -- commands


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
