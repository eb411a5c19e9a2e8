"""Writer and reader of a checkpoint's tensor files; the reader treats them as untrusted.

The format is that of ``torch.distributed.checkpoint`` (DCP). Its metadata is a pickle, and unpickling can execute any
code, so this reader constructs only the few plain classes that metadata consists of. DCP loads tensors with
``weights_only``.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.utils.errors import CheckpointError, Problem
from internlm.utils.torch_private import CHECKPOINT_METADATA_NAMES

# Exact pairs of module and name: attributes of allowed modules (``dataclass``, ``os``) would permit code execution.
_ALLOWED = {
    *CHECKPOINT_METADATA_NAMES,
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


def write_tensors(target: Path, tensors: LogicalTensors) -> None:
    """Write the slices of all ranks to ``target``; collective.

    Raises:
        CheckpointError: A rank cannot write. Raised on all ranks.
    """
    try:
        dcp.save(dict(tensors), storage_writer=PlainWriter(target), planner=LogicalSavePlanner())
    except CheckpointException as error:
        problem = Problem(str(target), f"cannot be written ({_causes(error)})", "Free space or choose another folder")
        raise CheckpointError(problem) from None


def read_tensors(source: Path, reader: SafeReader, tensors: LogicalTensors, *, collective: bool = True) -> None:
    """Read a checkpoint into the slices of ``tensors``.

    Args:
        source: Checkpoint folder, for the error.
        reader: Reader of the checkpoint.
        tensors: Tensors to read.
        collective: True if all ranks call this function; False if this process reads alone, without a process group.

    Raises:
        CheckpointError: A rank cannot read. Raised on all ranks if ``collective``.
    """
    try:
        with torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=LogicalLoadPlanner(), no_dist=not collective)
    except CheckpointException as error:
        problem = Problem(str(source), f"cannot be read ({_causes(error)})", "Choose an older checkpoint")
        raise CheckpointError(problem) from None


def _causes(error: CheckpointException) -> str:
    """Format each distinct cause of failure once, with the first rank that reports it and the number of others."""
    ranks: dict[str, list[int]] = {}
    for rank, failure in error.failures.items():
        ranks.setdefault(str(failure[0]), []).append(rank)
    return "; ".join(
        f"rank {failed[0]}{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}: {cause}"
        for cause, failed in ranks.items()
    )


# -- storage


class PlainWriter(dcp.FileSystemWriter):
    """DCP writer whose metadata contains no path of the machine that wrote it."""

    def storage_meta(self) -> StorageMeta:
        """Return storage metadata without the path of the checkpoint folder.

        The path would be pickled as a ``pathlib`` object, which :class:`SafeReader` refuses.
        """
        return StorageMeta(save_id=self.save_id)


class SafeReader(dcp.FileSystemReader):
    """DCP reader that executes no code from the checkpoint and reads no file outside of it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata`` with the restricted unpickler.

        Raises:
            CheckpointError: The metadata is damaged, or refers to a class or a file that no checkpoint needs.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _checked(_MetadataUnpickler(file).load())
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(
                Problem(str(path), f"cannot be read ({error})", "Choose an older checkpoint")
            ) from None
        # The base method, which this one replaces, sets these two attributes for later use by the base class.
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused a reference to {module}.{name}, which no checkpoint needs")


def _checked(metadata: Any) -> Metadata:
    """Return ``metadata`` after checking that it is DCP metadata whose files lie directly in the checkpoint folder."""
    if not isinstance(metadata, Metadata):
        raise ValueError(f"expected DCP metadata, got {type(metadata).__name__}")
    # Compare names rather than resolved paths: a name without separators cannot leave the folder by .. or a root.
    for info in (metadata.storage_data or {}).values():
        if info.relative_path != Path(info.relative_path).name:
            raise ValueError(f"expected a file name without folders, got {info.relative_path!r}")
    return metadata


# -- planners


class LogicalSavePlanner(DefaultSavePlanner):
    """DCP planner that writes the slices of logical tensors; a slice held by several ranks is written once."""

    def __init__(self) -> None:
        # The state dict is already flat, and the default planner cannot flatten a LogicalTensor.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the slice at ``index``, rounded to the dtype that the checkpoint stores."""
        logical = self.state_dict[index.fqn]
        tensor: Tensor = logical.__get_tensor_shard__(index).to(logical.dtype)
        return tensor


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
