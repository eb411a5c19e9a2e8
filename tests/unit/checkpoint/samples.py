"""Checkpoint files for tests."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from internlm.checkpoint import save_folder
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.tensor_files import LogicalSavePlanner, PlainWriter
from internlm.core.parallel.placement import slices_of_range


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


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


def write(target: Path, tensors: dict[str, LogicalTensor]) -> Path:
    """Save ``tensors`` in ``target`` as one process would."""
    dcp.save(dict(tensors), storage_writer=PlainWriter(target), planner=LogicalSavePlanner(), no_dist=True)
    return target


def complete(target: Path, state: str = '{"format": 1}') -> Path:
    """Make ``target`` a complete checkpoint."""
    target.mkdir(parents=True, exist_ok=True)
    (target / save_folder.STATE_FILE).write_text(state)
    (target / save_folder.COMMIT_FILE).write_text("")
    return target
