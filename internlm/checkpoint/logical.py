"""Logical tensors: what a checkpoint is made of, whatever the layout that wrote it.

A :class:`LogicalTensor` is a global shape and the boxes of it that this rank holds. It implements the protocol by which
``torch.distributed.checkpoint`` lets an object say what to write and where to read into, so that any layout can read
what another wrote.

The default planners of ``torch.distributed.checkpoint``, over a flat dict of :class:`LogicalTensor`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType

from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.param_state import compute_dtype, placed_parameters, state_buffers
from internlm.core.parallel.placement import ParamPlacement
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.optimizer.param_groups import ParamGroup
from internlm.utils.errors import CheckpointError, Problem

Offsets = tuple[int, ...]


class LogicalTensor:
    """The boxes of one logical tensor that this rank holds, by their offsets. They may be of a wider type than
    ``dtype``, in which they are written."""

    def __init__(self, global_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.global_shape, self.dtype = torch.Size(global_shape), dtype
        self.slices: dict[Offsets, Tensor] = {}

    def add(self, offsets: Offsets, tensor: Tensor) -> None:
        """Hold ``tensor`` as the box that begins at ``offsets``."""
        self.slices[offsets] = tensor.detach()

    @property
    def rounds(self) -> bool:
        """Whether boxes are rounded as they are written."""
        return any(box.dtype != self.dtype for box in self.slices.values())

    # The names below are the protocol's.
    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), tensor.size()),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.global_shape,
                ),
            )
            for offsets, tensor in self.slices.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), t.size()) for offsets, t in self.slices.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, index
        return self.slices[tuple(index.offset)]


Logical = dict[str, LogicalTensor]


def model_tensors(model: nn.Module) -> Logical:
    """``model/<name>``: this rank's part of each parameter, and each buffer that belongs to the model's state. Where
    ranks hold the same part, one of them writes it."""
    tensors: Logical = {}
    for name, parameter, placement in placed_parameters(model):
        tensors[f"model/{name}"] = tensor = LogicalTensor(placement.global_shape, compute_dtype(parameter))
        flat, start = local_shard(parameter)
        _add(tensor, placement, flat, start, start + len(flat))
    for name, buffer in state_buffers(model):
        tensors[f"model/{name}"] = whole = LogicalTensor(tuple(buffer.shape), buffer.dtype)
        whole.add((0,) * buffer.dim(), buffer)
    return tensors


def optimizer_tensors(optimizer: HybridZeroOptimizer) -> Logical:
    """``optimizer/<state>/<name>``: the boxes of each moment (and of main parameters wider than the model's) in this
    rank's shard."""
    tensors: Logical = {}
    for group in optimizer.groups:
        for state, parts in _states(optimizer, group):
            for piece in group.pieces():
                key, part = f"optimizer/{state}/{piece.name}", parts[piece.number][piece.lo : piece.hi]
                tensor = tensors.setdefault(key, LogicalTensor(piece.placement.global_shape, part.dtype))
                _add(tensor, piece.placement, part, piece.start, piece.stop)
    return tensors


def _states(optimizer: HybridZeroOptimizer, group: ParamGroup) -> Iterator[tuple[str, list[Tensor]]]:
    """Each state of the shard, in parts."""
    for name, state in optimizer.state_of(group).items():
        yield name, group.split(state)
    if group.has_main:
        yield "main", group.main_parts


def _add(tensor: LogicalTensor, placement: ParamPlacement, flat: Tensor, start: int, stop: int) -> None:
    """``flat`` is elements [start, stop) of the flattened part that lies here: add its boxes, as views of it."""
    for box in placement.slices(start, stop):
        tensor.add(box.offsets, flat[box.start - start : box.stop - start].view(box.sizes))


def without_rounded(tensors: Logical) -> Logical:
    """``tensors``, but none that would be read into the memory of a more precise one of them."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (tensor.rounds and name.replace("model/", "optimizer/main/", 1) in tensors)
    }


class LogicalSavePlanner(DefaultSavePlanner):
    """Writes the boxes of logical tensors; a box that several ranks hold is written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box at ``index``, rounded to what it is written as."""
        logical = self.state_dict[index.fqn]
        tensor: Tensor = logical.__get_tensor_shard__(index).to(logical.dtype)
        return tensor


class LogicalLoadPlanner(DefaultLoadPlanner):
    """Reads into the boxes of logical tensors, from whatever boxes they were written as."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict as it is; the default would rebuild it, for tensors on the meta device."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory of the box at ``index``."""
        tensor: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse what is no tensor: the default would unpickle it."""
        name = read_item.dest_index.fqn
        raise CheckpointError(Problem(name, "is a pickled object, not a tensor", "Load another checkpoint"))
