"""Whole runs whose checkpoints are in an object store that fails now and then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from internlm.checkpoint.object_storage import ObjectStorage
from internlm.config.schema.fields import ObjectAddress
from tests.dist.whole_runs import assert_same_tensors, fit, resume, saving
from tests.harness.object_server import BUCKET, Fault, ObjectServer, environment, object_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    with object_server() as running:
        for name, value in environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        yield running


def _model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name.startswith("model/")}


def test_a_run_saves_to_a_failing_store_and_is_resumed_past_a_damaged_checkpoint(
    server: ObjectServer, tmp_path: Path
) -> None:
    straight = fit(2, saving(tmp_path / "local"))
    local, remote = f"local:{tmp_path}/remote/ckpts", f"s3://{BUCKET}/runs/tiny"
    overrides = [override.replace(local, remote) for override in saving(tmp_path / "remote")]
    variables = environment(server.endpoint)
    server.faults = [
        Fault("PUT .*step-2/.*/rank", "status", times=3),
        Fault("PUT .*step-2/.*/rank", "reset", times=2),
        Fault("PUT .*step-2/manifest", "lost"),
        Fault("GET .*step-4/.*/rank", "truncated", times=2),
        Fault("PUT .*step-6/.*/rank", "lost", times=2),
    ]
    broken_off = fit(2, overrides, stop_after=4, environment=variables)
    more = ("ckpt.async_upload=True", "ckpt.enable_internevo2hf_ckpt=True")
    resumed = fit(2, [*overrides, *more], environment=variables)
    assert [fault.times for fault in server.faults] == [0] * 5
    assert broken_off.log + resumed.log == straight.log
    assert_same_tensors(resumed.tensors, straight.tensors)

    storage = ObjectStorage(ObjectAddress(BUCKET, "runs/tiny"))
    assert [name for name in storage.names() if name.endswith("/")] == ["step-2/", "step-4/", "step-6-hf/", "step-6/"]
    assert storage.leftovers() == {}
    load = {"path": f"{remote}/step-6-hf", "content": "('model',)", "ckpt_type": "hf"}
    loaded = resume(2, [f"ckpt.load_ckpt_info.{key}={value}" for key, value in load.items()], environment=variables)
    assert loaded.message.startswith(f"nothing to resume; loaded model from {remote}/step-6-hf")
    assert_same_tensors(_model(loaded.tensors), _model(straight.tensors))
    (attempt,) = (name for name in storage.names("step-6") if name.endswith("/"))
    file = f"step-6/{attempt}rank-00001.bin"
    content = bytearray(storage.read(file, 1 << 24))
    content[len(content) // 2] ^= 1
    storage.write(file, bytes(content))
    message = resume(2, overrides, environment=variables).message
    assert message == f"resumed from {remote}/step-4 at step 4 (step-6 did not verify)"
