"""A crash, a failure and a late request at every request of a save to an object store (F3), also while old checkpoints
are deleted (F5).

One process saves a checkpoint of a few kilobytes again and again; each time, the next request is the one that fails.
"""

from __future__ import annotations

import copy
import errno
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm.checkpoint import object_files
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.lease import LEASE_FILE
from internlm.checkpoint.logical_tensors import LogicalTensor, LogicalTensors
from internlm.checkpoint.object_client import Answer, ObjectClient, Patience
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.checkpoint.run_state import RunState
from internlm.checkpoint.save_folder import SaveFolder
from internlm.checkpoint.saved_checkpoint import find_checkpoints, open_checkpoint
from internlm.checkpoint.saver import Saver
from internlm.checkpoint.storage import PARTIAL
from internlm.checkpoint.tensor_writer import Save
from internlm.config.schema.fields import ObjectAddress
from internlm.utils.errors import CheckpointError
from tests.harness.object_server import BUCKET, environment, object_server
from tests.unit.checkpoint.samples import run_state

PATIENCE = Patience(connect=5.0, silence=5.0, request=10.0, retry=0.0)
#: Bytes of a part, so that a file is sent in three.
PART = 1000
SIZE = 600
#: Value of the tensor in the older checkpoint.
OLDER = 1.0
#: Operations that change the store. If the last request of a process is another one, the store is as after the last of
#: these.
CHANGES = ("put_", "delete_", "create_", "upload_", "complete_", "abort_")


class ProcessEnd(BaseException):
    """The process is killed; no handler of errors runs."""


@dataclass(frozen=True)
class Cause:
    """What happens to a request."""

    ends: bool
    """Whether the process ends; otherwise the request fails for good."""
    executed: str
    """Whether and when the store executes it: never, at once, or late, when the next owner has tidied up."""


CAUSES = {
    "killed before": Cause(True, "never"),
    "killed after": Cause(True, "at once"),
    "failed before": Cause(False, "never"),
    "failed after": Cause(False, "at once"),
    "late": Cause(False, "late"),
}


class InjuredClient(ObjectClient):
    """Client whose request number ``last`` suffers ``cause``; nothing is sent after the end of its process.

    Operations whose name does not begin with one of ``counted`` are not counted, and succeed.
    """

    def __init__(self, client: ObjectClient, last: int, cause: Cause, counted: tuple[str, ...]) -> None:
        self.__dict__.update(client.__dict__)
        self.last, self.cause, self.counted = last, cause, counted
        self.requests: list[str] = []
        self.late: list[Callable[[], Any]] = []
        self.has_ended = False

    def submit(self, operation: str, key: str, patience: float | None = None, **parameters: Any) -> Future[Answer]:
        send = super().submit
        if self.has_ended:
            raise ProcessEnd
        if not operation.startswith(self.counted):
            return send(operation, key, patience, **parameters)
        self.requests.append(f"{operation} {key}")
        if len(self.requests) != self.last:
            return send(operation, key, patience, **parameters)
        if self.cause.executed == "at once":
            send(operation, key, patience, **parameters).result()
        elif self.cause.executed == "late":
            self.late.append(lambda: send(operation, key, patience, **parameters).result())
        if self.cause.ends:
            self.has_ended = True
            raise ProcessEnd
        failed: Future[Answer] = Future()
        failed.set_result(OSError(errno.ETIMEDOUT, "no answer in time", self.url(key)))
        return failed


@pytest.fixture(scope="module")
def connected() -> Iterator[ObjectStorage]:
    """Object store of the tests, and a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with object_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.direct).items():
            patch.setenv(name, value)
        patch.setattr(object_files, "PART_BYTES", PART)
        yield ObjectStorage(ObjectAddress(BUCKET, ""), PATIENCE)
    dist.destroy_process_group()


def in_folder(storage: ObjectStorage, folder: str, client: ObjectClient | None = None) -> ObjectStorage:
    """Return the storage of a folder, with the client of another process."""
    own = copy.copy(storage)
    own.__dict__.update(_prefix=f"{folder}/", location=f"s3://{BUCKET}/{folder}", _undecided=set())
    own.__dict__.update({"_client": client} if client else {})
    return own


def run(storage: ObjectStorage, step: int, value: float, keep_last: int | None = None) -> None:
    """Save one checkpoint as a run does."""
    folder = SaveFolder(storage, keep_last)
    folder.open("job", lambda reason: None)
    try:
        save(folder, step, value)
    finally:
        folder.close()


def save(folder: SaveFolder, step: int, value: float) -> None:
    """Save a checkpoint in a folder that this process owns, and delete those that are not kept."""
    saver = Saver(folder.storage, folder.check_owner, folder.to_delete, lambda: None, Exchange())
    state = RunState(**{**run_state(step), "format": 2})
    saver.save(Save(checkpoint=f"step-{step}", step=step, state=state), tensors_of(value))


def tensors_of(value: float) -> LogicalTensors:
    """Return the only tensor of a checkpoint."""
    return {"model/w": LogicalTensor.whole(torch.full((SIZE,), value))}


def committed(storage: ObjectStorage) -> dict[str, float]:
    """Read and verify all committed checkpoints; return the value of the tensor of each."""
    values = {}
    for entry in find_checkpoints(storage):
        if entry.is_committed:
            tensors = tensors_of(0.0)
            open_checkpoint(storage, entry.name).read(tensors)
            (values[entry.name],) = {*tensors["model/w"].slices[0,].tolist()}
    return values


#: Whether step 40 is there before it is saved. Step 30 is, and is deleted if step 40 was committed.
ROWS = {"a new step": False, "an existing step": True}
PARAMETERS = [
    pytest.param("an existing step", [*CAUSES], CHANGES, id="an existing step, causes in turns"),
    *(
        pytest.param(row, [cause], ("",), id=f"{row}, {cause}", marks=pytest.mark.wide)
        for row, cause in itertools.product(ROWS, CAUSES)
    ),
]


@pytest.mark.fault("F3", "F5")
@pytest.mark.parametrize(("row", "causes", "counted"), PARAMETERS)
def test_every_request_of_a_save_may_be_the_last(
    row: str,
    causes: list[str],
    counted: tuple[str, ...],
    connected: ObjectStorage,
    record_property: Callable[[str, object], None],
) -> None:
    storage = in_folder(connected, f"{row}/{causes[0]}")
    for step in (30, 40):
        run(storage, step, OLDER)
    older = {name: storage.read(name, 1 << 20) for name in _files(storage, "step-30")}
    value = OLDER
    for last in itertools.count(1):
        for name, data in older.items():
            storage.write(name, data)
        if not ROWS[row]:
            storage.remove("step-40")
        client = InjuredClient(connected._client, last, CAUSES[causes[last % len(causes)]], counted)
        with suppress(ProcessEnd, CheckpointError, OSError):
            run(in_folder(connected, storage._prefix[:-1], client), 40, value + 1, keep_last=1)
        if last > len(client.requests):
            assert committed(storage) == {"step-40": value + 1}
            break
        _check(storage, client, {"step-30": OLDER, "step-40": value} if ROWS[row] else {"step-30": OLDER}, value + 1)
        value += 2
    record_property("faults", last - 1)
    assert last > 15


def test_a_save_that_a_store_fails_says_what_to_check(connected: ObjectStorage) -> None:
    client = InjuredClient(connected._client, 1, CAUSES["failed before"], ("upload_",))
    message = r"step-1: cannot be saved \(rank 0: s3://.*: no answer in time\)\. Check AWS_ENDPOINT_URL, and whether"
    with pytest.raises(CheckpointError, match=message):
        run(in_folder(connected, "fails", client), 1, OLDER)


def _check(storage: ObjectStorage, client: InjuredClient, old: dict[str, float], value: float) -> None:
    """Check what a save has left, what the next owner makes of it, and that the same step can be saved again."""
    injured = f"request {client.last}, {client.requests[client.last - 1]}"
    allowed = [old, {**old, "step-40": value}, {"step-40": value}]
    folder = SaveFolder(storage, keep_last=1)
    folder.open("next owner", lambda reason: None)
    # The manifest of an attempt beside a checkpoint may be on its way for an hour.
    assert storage.leftovers(settled="step-40" in old) == {}, injured
    assert not _temporary(storage), injured
    for send in client.late:
        send()
    assert committed(storage) in allowed, injured
    save(folder, 40, value + 1)
    assert committed(storage) == {"step-40": value + 1}, injured
    if client.late:
        folder.tidy()
    folder.close()
    assert storage.names() == [LEASE_FILE, "step-40/"], injured
    assert len(storage.names("step-40")) == 2, injured
    assert not _temporary(storage), injured


def _temporary(storage: ObjectStorage) -> list[str]:
    """Return what is left of checks, and of files that were sent in parts."""
    checks = [name for name in storage.names() if PARTIAL.fullmatch(name)]
    return checks + [key for key, _ in storage._uploads(storage._prefix)]


def _files(storage: ObjectStorage, folder: str = "") -> Iterator[str]:
    """Yield the names of all files."""
    for name in storage.names(folder):
        path = f"{folder}/{name}".strip("/")
        yield from _files(storage, path) if name.endswith("/") else [path]
