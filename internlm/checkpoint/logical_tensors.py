"""Logical tensors: checkpoint content that is independent of the parallel layout.

A :class:`LogicalTensor` has a global shape and the slices of this rank. It implements the protocol by which
``torch.distributed.checkpoint`` (DCP) finds the slices to write and the memory to read into, so a checkpoint can
be loaded with a parallel layout other than the one that it was saved with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.param_state import compute_dtype, placed_parameters, state_buffers
from internlm.core.parallel.placement import ParamPlacement
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.optimizer.param_groups import ParamGroup

#: Size limit of a piece in bytes. A reader verifies whole pieces, also where it needs a part, so they are not larger.
PIECE_BYTES = 4 << 20

Offsets: TypeAlias = tuple[int, ...]


class LogicalTensor:
    """Tensor of a checkpoint: the global shape, and the slices that this rank holds, keyed by their offsets.

    Slices are written in ``dtype``, but may have a wider dtype in memory: between steps, a fully sharded half-precision
    model has only its fp32 main parameters.
    """

    def __init__(self, global_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.global_shape, self.dtype = torch.Size(global_shape), dtype
        self.slices: dict[Offsets, Tensor] = {}

    @classmethod
    def whole(cls, tensor: Tensor) -> LogicalTensor:
        """Create a logical tensor whose only slice is ``tensor``, without copying."""
        logical = cls(tuple(tensor.shape), tensor.dtype)
        logical.add((0,) * tensor.dim(), tensor)
        return logical

    def add(self, offsets: Offsets, tensor: Tensor) -> None:
        """Add ``tensor`` as the slice at ``offsets``, without copying."""
        self.slices[offsets] = tensor.detach()

    @functools.cached_property
    def pieces(self) -> dict[Offsets, Tensor]:
        """Slices cut into pieces of at most :data:`PIECE_BYTES`, each of which gets a checksum of its own."""
        limit = max(PIECE_BYTES // self.dtype.itemsize, 1)
        return dict(piece for offsets, tensor in self.slices.items() for piece in cut(offsets, tensor, limit))

    def piece(self, offsets: Offsets) -> Tensor:
        """Return the piece at ``offsets``, in the dtype that it has in memory."""
        return self.pieces[tuple(offsets)]

    @property
    def rounds(self) -> bool:
        """Whether writing rounds the slices to a narrower dtype."""
        return any(tensor.dtype != self.dtype for tensor in self.slices.values())

    # DCP calls the methods below by these names.

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
            for offsets, tensor in self.pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), tensor.size()) for offsets, tensor in self.slices.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, index
        return self.slices[tuple(index.offset)]


def cut(offsets: Offsets, tensor: Tensor, limit: int, dim: int = 0) -> Iterator[tuple[Offsets, Tensor]]:
    """Yield the pieces of a slice with at most ``limit`` elements: runs of rows, or parts of rows that are too long.

    Args:
        offsets: Offsets of the slice in its tensor.
        tensor: The slice.
        limit: Limit of the elements of a piece.
        dim: First dimension to cut.
    """
    if tensor.numel() <= limit:
        yield offsets, tensor
        return
    rows = max(limit * tensor.shape[dim] // tensor.numel(), 1)
    for start in range(0, tensor.shape[dim], rows):
        part = tensor.narrow(dim, start, min(rows, tensor.shape[dim] - start))
        yield from cut((*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :]), part, limit, dim + 1)


LogicalTensors: TypeAlias = dict[str, LogicalTensor]


def model_tensors(model: nn.Module) -> LogicalTensors:
    """Return this rank's parameter shards and the persistent buffers of ``model``, keyed by ``model/<name>``."""
    tensors: LogicalTensors = {}
    for name, parameter, placement in placed_parameters(model):
        tensors[f"model/{name}"] = tensor = LogicalTensor(placement.global_shape, compute_dtype(parameter))
        flat, start = local_shard(parameter)
        _add_slices(tensor, placement, flat, start)
    for name, buffer in state_buffers(model):
        tensors[f"model/{name}"] = LogicalTensor.whole(buffer)
    return tensors


def optimizer_tensors(optimizer: HybridZeroOptimizer) -> LogicalTensors:
    """Return the optimizer state that this rank owns, keyed by ``optimizer/<state>/<name>``.

    The states are the moments and, if main parameters are wider than model parameters, ``main``. Each state has the
    global shape of its parameter, not that of ZeRO's flat shard, so that a run with another number of ranks or other
    param groups can read it.
    """
    tensors: LogicalTensors = {}
    for group in optimizer.groups:
        for state, shards in _states(optimizer, group):
            for part in group.shard_slices():
                key, shard = f"optimizer/{state}/{part.name}", shards[part.index][part.lo : part.hi]
                tensor = tensors.setdefault(key, LogicalTensor(part.placement.global_shape, shard.dtype))
                _add_slices(tensor, part.placement, shard, part.start)
    return tensors


def tensor_addresses(model: nn.Module, optimizer: HybridZeroOptimizer) -> list[int]:
    """Return where the tensors of a run are in memory: the same addresses belong to the same logical tensors."""
    tensors = [local_shard(parameter)[0] for parameter in model.parameters()]
    tensors += model.buffers()
    for group in optimizer.groups:
        tensors += [*optimizer.state_of(group).values(), *group.main_shards]
    return [tensor.data_ptr() for tensor in tensors]


def _states(optimizer: HybridZeroOptimizer, group: ParamGroup) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each state of a param group: its name, and its tensors in the order of ``group.main_shards``."""
    for name, state in optimizer.state_of(group).items():
        yield name, group.split(state)
    if group.has_main:
        yield "main", group.main_shards


def _add_slices(tensor: LogicalTensor, placement: ParamPlacement, flat: Tensor, start: int) -> None:
    """Append slices that cover ``flat`` to the slices of ``tensor``; the new slices are views of ``flat``.

    ``flat`` contains the elements of the flattened local tensor from index ``start`` on.
    """
    # A flat range consists of up to 2 · dim - 1 boxes: partial first row, whole rows, partial last row, recursively.
    for box in placement.slices(start, start + len(flat)):
        tensor.add(box.offsets, flat[box.start - start : box.stop - start].view(box.sizes))


def without_rounded(tensors: LogicalTensors) -> LogicalTensors:
    """Return ``tensors`` without the model parameters that would be read into the memory of their main parameters.

    In a fully sharded half-precision model, ``model/w`` and ``optimizer/main/w`` share memory, and the order in which
    DCP reads them is undefined.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (tensor.rounds and name.replace("model/", "optimizer/main/", 1) in tensors)
    }
