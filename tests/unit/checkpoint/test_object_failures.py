"""Requests to an object store whose answers are delayed, cut and lost, and a store that cannot be reached."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from internlm.checkpoint import locations, object_storage
from internlm.checkpoint.folder_checks import problem_of
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.checkpoint.storage import MANIFEST
from internlm.cli.main import main
from internlm.config.schema.fields import ObjectAddress
from internlm.utils import lazy
from internlm.utils.errors import UserError
from tests.harness.object_server import BUCKET, SECRET, Fault, ObjectServer
from tests.unit.checkpoint.stores import HASTY, PART, SHORT, manifest_of, put, save


@pytest.fixture
def storage(objects: ObjectStorage) -> ObjectStorage:
    return objects


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
    assert 1 < len(server.requests) < 200


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "why_missing", lambda module: "No module named 's3fs'")
    with pytest.raises(UserError, match=r"s3://bucket: needs the package 's3fs'.* Run: pip install 'InternEvo\[s3\]'"):
        locations.open_storage("s3://bucket/a")


# -- a store that cannot be used

NO_STORE = "s3://none-such/a"
CREDENTIALS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and what they may do there"
REACH = "Check AWS_ENDPOINT_URL, and whether the store runs and can be reached from here"
SETTINGS = "Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and AWS_PROFILE"
OTHERS = "Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
#: What is wrong, by changes of the environment, a fault, or a bucket; what the message must say, and what to do.
UNUSABLE: dict[str, tuple[dict[str, str | None] | Fault | str, str, str]] = {
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "Unable to locate credentials",
        CREDENTIALS,
    ),
    "unknown profile": ({"AWS_PROFILE": "none-such"}, "The config profile (none-such) could not be found", SETTINGS),
    "no address": ({"AWS_ENDPOINT_URL": "no address"}, "no address", SETTINGS),
    "credentials in the address": (
        {"AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1:1"},
        "credentials encoded in URL",
        SETTINGS,
    ),
    "refused": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:PORT"}, "Could not connect to the endpoint URL", REACH),
    "silent": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:LISTENING"}, "no answer in time", REACH),
    "unknown host": ({"AWS_ENDPOINT_URL": "http://host.invalid"}, "Could not connect to the endpoint URL", REACH),
    "no bucket": ("none-such", "not exist", "Create the bucket, or check its name and AWS_ENDPOINT_URL"),
    "unknown key": (Fault("", "status", status=403, code="InvalidAccessKeyId"), "InvalidAccessKeyId", CREDENTIALS),
    "wrong secret": (Fault("", "status", status=403, code="SignatureDoesNotMatch"), "SignatureDoes", CREDENTIALS),
    "another run": (Fault("", "status", status=412, code="PreconditionFailed"), "HTTP 412", "or stop that run"),
    "forbidden": (Fault("", "status", status=403, code="AccessDenied"), "AccessDenied", CREDENTIALS),
    "expired": (Fault("", "status", status=400, code="ExpiredToken"), "ExpiredToken", CREDENTIALS),
    "wrong region": (
        Fault("", "status", status=400, code="AuthorizationHeaderMalformed"),
        "AuthorizationHeaderMalformed",
        OTHERS,
    ),
    "down": (Fault("", "status"), "HTTP 503 SlowDown", OTHERS),
    "full": (Fault("", "status", status=507, code="XMinioStorageFull"), "StorageFull", "Free space in the store"),
}


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    """Port on which connections are refused, and one on which nothing is answered."""
    with socket.socket() as refusing, socket.socket() as listening:
        for listener in (refusing, listening):
            listener.bind(("127.0.0.1", 0))
        listening.listen()
        yield {"PORT": refusing.getsockname()[1], "LISTENING": listening.getsockname()[1]}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_store_that_cannot_be_used_is_an_error_that_says_what_to_check(
    case: str,
    server: ObjectServer,
    ports: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cause, message, todo = UNUSABLE[case]
    bucket = cause if isinstance(cause, str) else BUCKET
    server.faults = [replace(cause, times=999)] if isinstance(cause, Fault) else []
    for name, value in (cause if isinstance(cause, dict) else {}).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            port = next((f"{port}" for word, port in ports.items() if value.endswith(f":{word}")), "")
            monkeypatch.setenv(name, value.rpartition(":")[0] + f":{port}" if port else value)
    short = replace(SHORT, silence=0.3, retry=0.3)
    monkeypatch.setattr(object_storage, "Patience", lambda: short)
    monkeypatch.setattr(object_storage, "_START_PATIENCE", short.retry)
    storage, started = ObjectStorage(ObjectAddress(bucket, "a"), short), time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        storage.prepare()
    at_start = str(problem_of(caught.value, storage, "Choose a writable folder with free space"))
    with pytest.raises(SystemExit, match="2"):
        main(["ckpt", "ls", f"s3://{bucket}/a"])
    in_command = capsys.readouterr().err.strip()
    assert time.monotonic() - started < 5
    for text in (at_start, in_command):
        assert message in text
        assert text.endswith(todo)
        assert f"s3://{bucket}/a" in text
        assert "\n" not in text
        assert SECRET not in text
