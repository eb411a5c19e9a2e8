"""Checkpoint files for tests."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta

from internlm.checkpoint import format_1
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.manifest import FileRecord, Manifest, checksum, parse_manifest
from internlm.checkpoint.planners import LogicalSavePlanner
from internlm.checkpoint.run_state import RunState
from internlm.checkpoint.saved_checkpoint import read_manifest
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_writer import Save, TensorWriter
from internlm.checkpoint.verification import damaged_files, manifest_files
from internlm.core.parallel.placement import slices_of_range
from internlm.utils.errors import CheckpointError, Problem


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def damage(storage: Storage, name: str) -> list[Problem]:
    """Read the files of a checkpoint of format 2, and return what does not verify: of each file the first bad bytes."""
    try:
        return damaged_files(storage, name, manifest_files(read_manifest(storage, name)))
    except CheckpointError as error:
        return list(error.problems)


def in_ranges(tensor: Tensor, split_at: list[int]) -> LogicalTensor:
    """Return ``tensor`` as the slices of its flat ranges between ``split_at``, each a copy."""
    logical = LogicalTensor(tuple(tensor.shape), tensor.dtype)
    bounds = [0, *sorted(split_at), tensor.numel()]
    for start, stop in pairwise(bounds):
        for tensor_slice in slices_of_range(tensor.shape, start, stop):
            logical.add(
                tensor_slice.offsets,
                tensor.flatten()[tensor_slice.start : tensor_slice.stop].view(tensor_slice.sizes).clone(),
            )
    return logical


def save(target: Path, tensors: dict[str, LogicalTensor], step: int = 3) -> Path:
    """Save the checkpoint ``target`` as one process would."""
    save_to(LocalStorage(target.parent), target.name, tensors, step)
    return target


def save_to(storage: Storage, name: str, tensors: dict[str, LogicalTensor], step: int) -> None:
    """Save a checkpoint in ``storage`` as one process would."""
    state = RunState(**{**run_state(step), "format": 2})
    writer = TensorWriter(storage, Save(checkpoint=name, step=step, state=state), "a1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group, which is meant here
        dcp.save(dict(tensors), storage_writer=writer, planner=LogicalSavePlanner(), no_dist=True)


def rewrite_state(checkpoint: Path, text: bytes) -> None:
    """Replace ``state.json`` of a checkpoint of format 2 by ``text``, with a valid checksum."""
    (checkpoint / "state.json").write_bytes(text)
    record = FileRecord(size=len(text), checksum=checksum(text))
    rewrite_manifest(checkpoint, lambda manifest: {"files": {**manifest.files, "state.json": record}})


def rewrite_manifest(checkpoint: Path, change: Callable[[Manifest], dict[str, Any]]) -> None:
    """Replace values of a manifest by those that ``change`` returns, with a valid checksum."""
    file = checkpoint / "manifest.json"
    manifest = parse_manifest(file.read_bytes(), None)
    file.write_bytes(manifest.model_copy(update=change(manifest)).to_bytes())


class PlainWriter(dcp.FileSystemWriter):
    """Writer of format 1: DCP's, with no path of the machine in the metadata."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


def write(target: Path, tensors: dict[str, LogicalTensor]) -> Path:
    """Save ``tensors`` in ``target`` in format 1 as one process would."""
    dcp.save(dict(tensors), storage_writer=PlainWriter(target), planner=LogicalSavePlanner(), no_dist=True)
    return target


def run_state(step: int = 3) -> dict[str, Any]:
    """Return the content of a valid ``state.json`` of format 1."""
    return {
        "format": 1,
        "config": {"model_type": "LLAMA2", "model": {"num_layers": 2}, "data": {"seq_len": 8}},
        "train_state": {"step": step, "num_consumed_tokens": 96, "inf_nan_skip_batches": 1},
        "optimizer": {
            "updates": 2,
            "skipped_in_a_row": 0,
            "loss_scale": {"scale": 65536.0, "good_steps": 1, "overflows": 0},
        },
        "sampler": [step, 4, 16],
        "sampler_state": {},
        "data_files": "",
        "data": "00ff",
        "seed": 1024,
        "world_size": 2,
        "cpu_kernels": {"a processor": {"linear": "torch"}},
        "save_folder": "/ckpts",
        "run_folder": "/runs/1",
        "launcher": "boot/pid:[1]/7/99",
        "versions": {"torch": "2.13.0"},
    }


def complete(target: Path, state: str | None = None) -> Path:
    """Make ``target`` a complete checkpoint of format 1, of the step that its name says."""
    target.mkdir(parents=True, exist_ok=True)
    step = target.name.removeprefix("step-")
    valid = json.dumps(run_state(int(step) if step.isdigit() else 3))
    (target / format_1.STATE_FILE).write_text(valid if state is None else state)
    (target / format_1.COMMIT_FILE).write_text("")
    return target
