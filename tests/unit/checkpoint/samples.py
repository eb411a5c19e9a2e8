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


def in_runs(tensor: Tensor, cuts: list[int]) -> LogicalTensor:
    """``tensor`` as the boxes of its runs between ``cuts``, each a copy."""
    logical = LogicalTensor(tuple(tensor.shape), tensor.dtype)
    bounds = [0, *sorted(cuts), tensor.numel()]
    for start, stop in pairwise(bounds):
        for box in slices_of_range(tensor.shape, start, stop):
            logical.add(box.offsets, tensor.flatten()[box.start : box.stop].view(box.sizes).clone())
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
