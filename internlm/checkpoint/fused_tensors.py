"""Tensors of a run by the names of a checkpoint whose projections are fused in another way.

A model with ``enable_qkv_fusion`` or ``mlp_layer_fusion`` has one tensor where a model without has several, with the
same elements (:mod:`internlm.model.projections`). A checkpoint of either is loaded into either, and nothing is copied:
the slices of a run are views, under other names and at other offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from internlm.checkpoint.logical_tensors import LogicalTensor, LogicalTensors
from internlm.model.projections import GATE_UP, QKV, Part, Projection

#: Map from the names of a checkpoint to the metadata of its tensors.
Stored = Mapping[str, Any]


def as_stored(tensors: LogicalTensors, stored: Stored) -> LogicalTensors:
    """Return views of ``tensors`` under the names of a checkpoint.

    A tensor that the checkpoint has is returned as it is, and so is one that it has in no form.
    """
    found: LogicalTensors = {}
    for name, tensor in tensors.items():
        projection, linear, names = _counterparts(name, stored)
        if projection is None or len(tensor.global_shape) <= projection.axis:
            found[name] = tensor
        elif linear == projection.name:
            parts = projection.parts(tensor.global_shape[projection.axis])
            for other, (_, part) in zip(names, parts, strict=True):
                found[other] = _part_of(tensor, part)
        else:
            (fused,) = names
            shape, axis = list(tensor.global_shape), projection.axis
            size = stored[fused].size[axis]
            part = dict(projection.parts(size))[linear]
            # That of the checkpoint, unless it is of a model of other sizes, which the caller reports.
            shape[axis] += size - part.length
            _add_part(found.setdefault(fused, LogicalTensor(tuple(shape), tensor.dtype)), tensor, part)
    return found


def names_as_stored(names: Iterable[str], stored: Stored) -> set[str]:
    """Return the names of a checkpoint for the ``names`` of tensors of a run; those that it has in no form stay."""
    return {other for name in names for other in _counterparts(name, stored)[2] or (name,)}


def _counterparts(name: str, stored: Stored) -> tuple[Projection | None, str, list[str]]:
    """Return a projection that a checkpoint fuses in another way than a run that has the tensor ``name``.

    Returns:
        The projection, the linear of the run, and the names of the tensors of the checkpoint. None and no names if the
        checkpoint has the tensor itself, or has no such projection.
    """
    *outer, linear, parameter = ("", *name.split("."))
    for projection in (QKV, GATE_UP) if name not in stored else ():
        others = tuple(projection.ranges) if linear == projection.name else (projection.name,)
        names = [".".join((*outer[1:], other, parameter)) for other in others]
        is_of_it = linear == projection.name or linear in projection.ranges
        if is_of_it and all(_has_axis(stored.get(other), projection.axis) for other in names):
            return projection, linear, names
    return None, linear, []


def _has_axis(tensor: Any, axis: int) -> bool:
    return isinstance(tensor, TensorStorageMetadata) and len(tensor.size) > axis


def _part_of(tensor: LogicalTensor, part: Part) -> LogicalTensor:
    """Return a part of a tensor as a tensor."""
    axis, start, length = part
    found = LogicalTensor((*tensor.global_shape[:axis], length, *tensor.global_shape[axis + 1 :]), tensor.dtype)
    for offsets, own in tensor.slices.items():
        first = max(offsets[axis], start)
        last = min(offsets[axis] + own.shape[axis], start + length)
        if first < last:
            view = own.narrow(axis, first - offsets[axis], last - first)
            found.add((*offsets[:axis], first - start, *offsets[axis + 1 :]), view)
    return found


def _add_part(whole: LogicalTensor, tensor: LogicalTensor, part: Part) -> None:
    """Add the slices of ``tensor``, which is a part of ``whole``."""
    for offsets, own in tensor.slices.items():
        shifted = offsets[part.axis] + part.start
        whole.add((*offsets[: part.axis], shifted, *offsets[part.axis + 1 :]), own)
