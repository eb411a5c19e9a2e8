"""Storages for tests: one server of the S3 protocol with a folder for each test, and a folder of another user."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm.checkpoint import object_files
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.config.schema.fields import ObjectAddress
from tests.harness.object_server import BUCKET, ObjectServer, environment, object_server
from tests.unit.checkpoint.stores import HASTY, PART

NOBODY = 65534


@pytest.fixture(scope="session")
def running() -> Iterator[ObjectServer]:
    """Server that all tests share."""
    with object_server() as server:
        yield server


@pytest.fixture
def server(running: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """Server without faults; the environment of this process names it."""
    running.faults, running.requests, running.late, running.silence = [], [], [], 1.0
    for name, value in environment(running.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(object_files, "PART_BYTES", PART)
    return running


@pytest.fixture(scope="session")
def connected(running: ObjectServer) -> ObjectStorage:
    """Storage whose client all tests share: making one takes tenths of a second."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.endpoint).items():
            patch.setenv(name, value)
        storage = ObjectStorage(ObjectAddress(BUCKET, ""), HASTY)
        storage.prepare()
    return storage


@pytest.fixture
def objects(server: ObjectServer, connected: ObjectStorage, request: pytest.FixtureRequest) -> ObjectStorage:
    """Object store with a folder of its own, so that tests share the server, but no object."""
    address = ObjectAddress(BUCKET, f"runs/{abs(hash(request.node.nodeid))}")
    own = copy.copy(connected)
    own.__dict__.update(
        _prefix=f"{address.prefix}/", location=f"s3://{address.bucket}/{address.prefix}", _undecided=set()
    )
    server.requests.clear()
    return own


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
