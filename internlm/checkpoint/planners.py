"""Planners of ``torch.distributed.checkpoint`` (DCP) for logical tensors."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.utils.errors import CheckpointError, Problem


class LogicalSavePlanner(DefaultSavePlanner):
    """DCP planner that writes the pieces of logical tensors.

    A piece that several ranks hold is written by one of them; pieces are distributed so that all write as many bytes.
    """

    def __init__(self) -> None:
        # The state dict is already flat, and the default planner cannot flatten a LogicalTensor.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged: dict[MetadataIndex, Tensor] = {}

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the piece at ``index`` in the dtype that the checkpoint stores: its copy, if it was staged."""
        staged = self._staged.get(index)
        return self._piece(index) if staged is None else staged

    @property
    def is_staged(self) -> bool:
        """Whether the pieces that this rank writes were copied to host memory."""
        return bool(self._staged)

    def _piece(self, index: MetadataIndex) -> Tensor:
        logical = self.state_dict[index.fqn]
        piece: Tensor = logical.piece(index.offset).to(logical.dtype)
        return piece

    def stage(self, plan: SavePlan, memory: Tensor) -> None:
        """Copy the pieces of ``plan`` to host memory, from which they are written while training changes the tensors.

        Args:
            plan: Plan of this rank.
            memory: Buffer of :func:`staging_bytes`, uint8.
        """
        start = 0
        for item in plan.items:
            size = bytes_of_item(item)
            logical = self.state_dict[item.index.fqn]
            piece = logical.piece(item.index.offset)
            copy = memory[start : start + size].view(logical.dtype).view(piece.shape)
            # Without waiting for the device after each piece: the caller waits once.
            copy.copy_(piece, non_blocking=True)
            self._staged[item.index] = copy
            start += _aligned(size)


#: Alignment of pieces in host memory, in bytes; that of a dtype is the least that is needed.
_ALIGNMENT = 64


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def bytes_of_item(item: WriteItem) -> int:
    """Return the size of a piece in bytes."""
    assert item.tensor_data is not None, item
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def bytes_of(plan: SavePlan) -> int:
    """Return the number of bytes that a rank writes by ``plan``."""
    return sum(map(bytes_of_item, plan.items))


def staging_bytes(plan: SavePlan) -> int:
    """Return the size in bytes of the buffer that :meth:`LogicalSavePlanner.stage` needs."""
    return sum(_aligned(bytes_of_item(item)) for item in plan.items)


class LogicalLoadPlanner(DefaultLoadPlanner):
    """DCP planner that reads into the slices of logical tensors, whatever slices the checkpoint contains."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Use the state dict unchanged; the default planner rebuilds it to replace tensors on the meta device."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the slice at ``index``, into whose memory DCP reads."""
        tensor: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raise an error for an entry that is a pickled object; the default planner would unpickle it."""
        name = read_item.dest_index.fqn
        raise CheckpointError(Problem(name, "expected a tensor, got a pickled object", "Choose another checkpoint"))


def read_alone(tensors: LogicalTensors, metadata: Metadata, reader: Any) -> None:
    """Read ``tensors`` with a DCP reader, each rank on its own: planning a load needs no other rank.

    Args:
        tensors: Tensors to read into.
        metadata: Metadata of the checkpoint, as the reader returned it.
        reader: ``StorageReader`` of the checkpoint.
    """
    planner = LogicalLoadPlanner()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(planner.create_local_plan())
    with torch.no_grad():
        reader.read_data(plan, planner).wait()
