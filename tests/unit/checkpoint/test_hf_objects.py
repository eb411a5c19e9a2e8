"""Hugging Face folders in an object store: written, read with few requests, and never half."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from internlm.checkpoint import export_folder, folder_files, model_folders, object_files
from internlm.checkpoint.hf_folder import HFFolder
from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.hf_runs import export_of_run, lacks_export
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.model_folders import folder_type
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.checkpoint.storage import Storage
from internlm.cli.main import main
from internlm.utils.errors import CheckpointError
from tests.harness.object_server import BUCKET, Fault, ObjectServer
from tests.unit.checkpoint.hf_samples import GQA, checkpoint_of, opened, same_bits, tensors_of, weights_of
from tests.unit.checkpoint.samples import save_to
from tests.unit.model.samples import decoder

MODEL = decoder("LLAMA2", torch.float32, **GQA)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Checkpoint of MODEL."""
    return checkpoint_of(MODEL, "LLAMA2", tmp_path / "step-3")


@pytest.fixture(autouse=True)
def one_client(objects: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open all addresses with the client that tests share: making one takes tenths of a second."""

    def opened_with_it(location: str) -> Storage:
        folder = location.removeprefix("boto3:").removeprefix(f"s3://{BUCKET}").strip("/")
        own = copy.copy(objects)
        own.__dict__.update(_prefix=f"{folder}/", location=f"s3://{BUCKET}/{folder}", _undecided=set())
        return own

    monkeypatch.setattr(object_files, "PART_BYTES", 1 << 20)
    for module in (export_folder, folder_files, model_folders):
        monkeypatch.setattr(module, "open_storage", opened_with_it)


def _exits(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Return what a command writes that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(["convert", *command])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_there_and_back(
    checkpoint: Path, objects: ObjectStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a folder and a checkpoint in the store; ``config.json`` is the last file, and nothing is replaced."""
    folder, imported = f"{objects.location}/hf", f"boto3:{objects.location}/mine"
    assert main(["convert", "to-hf", str(checkpoint), folder, "--shard-size", "1MB"]) is None
    assert f"{folder}: 1 file with tensors" in capsys.readouterr().out
    assert objects.names("hf") == ["config.json", "model.safetensors"]
    assert objects.written("hf/config.json") >= objects.written("hf/model.safetensors")
    assert folder_type(folder) == "hf"
    assert main(["convert", "from-hf", folder, str(tmp_path / "back")]) is None
    assert same_bits(tensors_of(tmp_path / "back"), weights_of(MODEL))
    assert main(["convert", "from-hf", folder, imported]) is None
    stored = open_checkpoint(objects, "mine")
    whole = {f"model/{name}": torch.empty_like(x) for name, x in weights_of(MODEL).items()}
    stored.read({name: LogicalTensor.whole(x) for name, x in whole.items()})
    assert same_bits({name.removeprefix("model/"): x for name, x in whole.items()}, weights_of(MODEL))
    for arguments in (("to-hf", str(checkpoint), folder), ("from-hf", folder, imported)):
        assert "exists already. Choose another name, or remove it" in _exits(capsys, *arguments)
    missing = f"{objects.location}/none"
    assert _exits(capsys, "from-hf", missing, str(tmp_path / "x")).startswith(f"{missing}: does not exist")
    for command, what in (("from-llama", "releases of Meta"), ("from-internevo", "pickled files")):
        assert f"is in an object store, where {what}" in _exits(capsys, command, folder, str(tmp_path / "x"))


def test_columns_are_read_by_few_requests(checkpoint: Path, objects: ObjectStorage, server: ObjectServer) -> None:
    """A rank that holds some columns of a matrix does not send a request for each row."""
    main(["convert", "to-hf", str(checkpoint), f"{objects.location}/hf"])
    weight = weights_of(MODEL)["layers.1.attention.wo.weight"]
    target = torch.empty(weight.shape[0], 5)
    with HFReader(HFFolder(f"{objects.location}/hf"), MODEL.spec) as reader:
        reader.check()
        server.requests.clear()
        reader.read_slice("layers.1.attention.wo.weight", (0, 7), target)
    assert torch.equal(target, weight[:, 7:12])
    assert len(server.requests) <= 3


def test_a_failed_export_leaves_no_folder(
    checkpoint: Path, objects: ObjectStorage, server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [Fault(r"PUT .*config\.json", "status", times=99, status=403, code="AccessDenied")]
    assert "AccessDenied" in _exits(capsys, "to-hf", str(checkpoint), f"{objects.location}/hf")
    server.faults = []
    assert objects.names("hf") == []


def test_an_export_that_was_cut_off_is_noticed(checkpoint: Path, objects: ObjectStorage) -> None:
    """One without its last file, and one of an earlier checkpoint of this name."""
    tensors = {f"model/{name}": LogicalTensor.whole(x) for name, x in weights_of(MODEL).items()}
    save_to(objects, "step-3", tensors, 3)
    config = {**opened(checkpoint).state.config, "data": {}}
    assert lacks_export(objects, "step-3")
    assert not lacks_export(objects, "step-4")  # of which there is no checkpoint
    export_of_run(objects, "step-3", config)
    assert not lacks_export(objects, "step-3")
    objects.remove("step-3-hf/config.json")
    assert lacks_export(objects, "step-3")
    with pytest.raises(CheckpointError, match=r"step-3-hf/config\.json: is missing"):
        HFFolder(f"{objects.location}/step-3-hf")
