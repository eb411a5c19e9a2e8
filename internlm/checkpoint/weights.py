"""The weights of a checkpoint, for a model that is to be used rather than trained."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from internlm.checkpoint import compatibility, storage
from internlm.checkpoint.logical import LogicalLoadPlanner, model_tensors
from internlm.checkpoint.storage import SafeReader
from internlm.utils.errors import CheckpointError


def load_weights(model: nn.Module, source: Path) -> None:
    """Load the parameters of ``model`` from a checkpoint folder ``step-N``; needs no process group.

    Raises :class:`CheckpointError` where the folder is not a complete checkpoint or does not fit the model.
    """
    storage.read_state(source)
    reader = SafeReader(source)
    tensors = model_tensors(model)
    metadata = reader.read_metadata()
    problems = [
        *compatibility.missing_tensors(str(source), metadata, tensors),
        *compatibility.unexpected_tensors(str(source), metadata, tensors),
        *compatibility.damaged_files(source, metadata),
    ]
    if problems:
        raise CheckpointError(*problems)
    with torch.no_grad():
        dcp.load(dict(tensors), storage_reader=reader, planner=LogicalLoadPlanner(), no_dist=True)
