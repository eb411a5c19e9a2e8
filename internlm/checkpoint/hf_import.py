"""Import of a folder of other software as a checkpoint, which a run loads in any layout.

Pieces of tensors are read, converted and written one after the other, so memory is that of one piece, a few megabytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from internlm.checkpoint.export_folder import check_new, storage_of
from internlm.checkpoint.hf_folder import HFFolder, ModelFolder, TensorFolder
from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.hf_specs import NamedSpec, spec_of_folder
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.manifest import FORMAT
from internlm.checkpoint.planners import LogicalSavePlanner
from internlm.checkpoint.run_state import LossScaleState, OptimizerCounters, RunState, TrainCounters, current_versions
from internlm.checkpoint.storage import MANIFEST
from internlm.checkpoint.tensor_writer import Save, TensorWriter


def import_folder(
    source: Path | str, target: Path | str, opened: Callable[[Path | str], ModelFolder] = HFFolder
) -> str:
    """Write the model of a folder with a config as a checkpoint of step 0, without optimizer state.

    Args:
        source: Path of the folder, or of a Hugging Face folder its address in an object store.
        target: Path or address of the checkpoint, which must not exist.
        opened: Function that opens the folder: by default, one of Hugging Face.

    Returns:
        The ``model`` section of a config for it, as Python.

    Raises:
        CheckpointError: The folder is damaged, or its model has no counterpart; or ``target`` exists.
        OSError: The checkpoint cannot be written.
    """
    check_new(target)
    folder = opened(source)
    return import_model(folder, spec_of_folder(folder), target)


def import_model(folder: TensorFolder, model: NamedSpec, target: Path | str) -> str:
    """Write ``model``, whose tensors are in ``folder``, as :func:`import_folder` does."""
    check_new(target)
    with HFReader(folder, model.spec) as reader:
        reader.check()
        dtypes = {name: reader.dtype(name) for name in reader.rows}
        section = {**model.keys, "dtype": str(reader.main_dtype)}
        _write(reader, dtypes, target, _state(model, section))
    return "\n".join(_snippet(folder.path, target, model.model_type, section)) + "\n"


class _LazyPlanner(LogicalSavePlanner):
    """Planner that reads a piece from the folder when it is written."""

    def __init__(self, reader: HFReader) -> None:
        super().__init__()
        self._reader = reader
        # Used again for each piece: the first use of new memory takes about as long as reading into it.
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the piece at ``index``, which is valid until the next is read."""
        logical = self.state_dict[index.fqn]
        # Pieces of whole fused tensors are made here, from several tensors of theirs.
        shape = logical.piece(index.offset).shape
        size = shape.numel() * logical.dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        piece = self._memory[:size].view(logical.dtype).view(shape)
        assert index.offset is not None
        self._reader.read_slice(index.fqn.removeprefix("model/"), tuple(index.offset), piece)
        return piece


def _write(reader: HFReader, dtypes: Mapping[str, torch.dtype], target: Path | str, state: RunState) -> None:
    # Tensors on the meta device have a shape, and no memory.
    tensors = {
        f"model/{name}": LogicalTensor.whole(torch.empty(reader.shapes[name], dtype=dtype, device="meta"))
        for name, dtype in dtypes.items()
    }
    # Written and published as any other checkpoint: a process that is killed leaves none that is half.
    (storage, name), attempt = storage_of(target), secrets.token_hex(4)
    storage.prepare()
    planner = _LazyPlanner(reader)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    writer = TensorWriter(storage, Save(checkpoint=name, step=0, state=state), attempt)
    try:
        results = writer.write_data(planner.finish_plan(plans[0]), planner).value()
        # Again before it is published, which would replace a checkpoint.
        writer.before_commit = lambda: check_new(target, MANIFEST)
        writer.finish(metadata, [results])
    except BaseException:
        storage.discard(name, attempt)
        raise


def _state(model: NamedSpec, section: Mapping[str, Any]) -> RunState:
    # All keys, with the defaults of today: a later version may have others.
    resolved = {**model.spec.config.model_dump(mode="json"), "dtype": section["dtype"]}
    return RunState(
        format=FORMAT,
        config={"model_type": model.model_type, "model": resolved, "data": {}},
        train_state=TrainCounters(step=0, num_consumed_tokens=0, inf_nan_skip_batches=0),
        optimizer=OptimizerCounters(
            updates=0, skipped_in_a_row=0, loss_scale=LossScaleState(scale=1.0, good_steps=0, overflows=0)
        ),
        sampler=[0, 0, 0],
        data="",
        seed=0,
        versions=current_versions(),
    )


def _snippet(source: str, target: Path | str, model_type: str, section: Mapping[str, Any]) -> Iterator[str]:
    yield f"# The model of {source!r}."
    yield f"model_type = {model_type!r}"
    yield "model = dict("
    yield from (f"    {key}={value!r}," for key, value in section.items() if value is not None)
    yield ")"
    yield f"ckpt = dict(load_ckpt_info=dict(path={str(target)!r}, content=('model',)))"
