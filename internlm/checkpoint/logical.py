"""Logical tensors: what a checkpoint is made of, whatever the layout that wrote it.

A :class:`LogicalTensor` is a global shape and the boxes of it that this rank holds. It implements the protocol by which
``torch.distributed.checkpoint`` lets an object say what to write and where to read into, so that any layout can read
what another wrote.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from internlm.core.parallel.placement import placed_parameters, state_buffers
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.optimizer.flat_group import FlatGroup, Piece

Offsets = tuple[int, ...]


class LogicalTensor:
    """The boxes of one logical tensor that this rank holds, by their offsets."""

    def __init__(self, global_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.global_shape, self.dtype = torch.Size(global_shape), dtype
        self.boxes: dict[Offsets, Tensor] = {}

    def add(self, offsets: Offsets, tensor: Tensor) -> None:
        """Hold ``tensor`` as the box that begins at ``offsets``."""
        self.boxes[offsets] = tensor.detach()

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
            for offsets, tensor in self.boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), t.size()) for offsets, t in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, index
        return self.boxes[tuple(index.offset)]


Logical = dict[str, LogicalTensor]


def model_tensors(model: nn.Module) -> Logical:
    """``model/<name>``: this rank's part of each parameter, and each buffer that belongs to the model's state. Where
    ranks hold the same part, one of them writes it."""
    tensors: Logical = {}
    for name, parameter, placement in placed_parameters(model):
        tensor = LogicalTensor(placement.global_shape, parameter.dtype)
        for box in placement.boxes(0, parameter.numel()):
            tensor.add(box.offsets, parameter.detach().view(-1)[box.start : box.stop].view(box.sizes))
        tensors[f"model/{name}"] = tensor
    for name, buffer in state_buffers(model):
        tensors[f"model/{name}"] = whole = LogicalTensor(tuple(buffer.shape), buffer.dtype)
        whole.add((0,) * buffer.dim(), buffer)
    return tensors


def optimizer_tensors(optimizer: HybridZeroOptimizer) -> Logical:
    """``optimizer/<state>/<name>``: the boxes of each moment (and of main parameters wider than the model's) in this
    rank's shard."""
    tensors: Logical = {}
    for group in optimizer.groups:
        for state, flat in _flat_states(optimizer, group):
            for piece in group.pieces():
                key = f"optimizer/{state}/{piece.member.name}"
                shape = piece.member.placement.global_shape
                tensor = tensors.setdefault(key, LogicalTensor(shape, flat.dtype))
                for offsets, view in _views(piece, flat):
                    tensor.add(offsets, view)
    return tensors


def _flat_states(optimizer: HybridZeroOptimizer, group: FlatGroup) -> Iterator[tuple[str, Tensor]]:
    state = optimizer.state_of(group)
    yield "exp_avg", state["exp_avg"]
    yield "exp_avg_sq", state["exp_avg_sq"]
    if group.main.dtype != group.values.dtype:
        yield "main", group.main


def _views(piece: Piece, flat: Tensor) -> Iterator[tuple[Offsets, Tensor]]:
    """Boxes of the logical tensor, as views of the shard's flat tensor."""
    for box in piece.member.placement.boxes(piece.start, piece.stop):
        begin = piece.lo + box.start - piece.start
        yield box.offsets, flat[begin : begin + box.stop - box.start].view(box.sizes)
