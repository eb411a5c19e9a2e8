"""Write and read the tensor files of a checkpoint, without trusting what is read.

The files are those of ``torch.distributed.checkpoint`` (DCP). Its metadata is a pickle, and a pickle may execute
anything; the reader here builds only the handful of plain classes that metadata consists of. Tensors are loaded by DCP
with ``weights_only``.
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

# By exact module and name: attributes of allowed modules (``dataclass``, ``os``) would be a way to code execution.
_ALLOWED = {
    *CHECKPOINT_METADATA_NAMES,
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


def write_tensors(target: Path, tensors: LogicalTensors) -> None:
    """Write the slices of all ranks; collective.

    Raises:
        CheckpointError: a rank can't write. It is raised on all ranks.
    """
    try:
        dcp.save(dict(tensors), storage_writer=PlainWriter(target), planner=LogicalSavePlanner())
    except CheckpointException as error:
        problem = Problem(str(target), f"can't be written ({_causes(error)})", "Make room or choose another folder")
        raise CheckpointError(problem) from None


def read_tensors(source: Path, reader: SafeReader, tensors: LogicalTensors, *, collective: bool = True) -> None:
    """Read into the slices of ``tensors``, on all ranks together or on this process alone.

    Raises:
        CheckpointError: a rank can't read. Where ``collective``, it is raised on all ranks.
    """
    try:
        with torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=LogicalLoadPlanner(), no_dist=not collective)
    except CheckpointException as error:
        problem = Problem(str(source), f"can't be read ({_causes(error)})", "Choose an older one")
        raise CheckpointError(problem) from None


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())


# -- storage


class PlainWriter(dcp.FileSystemWriter):
    """A writer whose metadata contains nothing of the machine that wrote it."""

    def storage_meta(self) -> StorageMeta:
        """Leave out the folder's path: it would be one more class for the reader to build, and a lie after a move."""
        return StorageMeta(save_id=self.save_id)


class SafeReader(dcp.FileSystemReader):
    """A reader that executes nothing it finds, and reads no file outside the checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``.

        Raises:
            CheckpointError: it is damaged, or refers to a class or a file that no checkpoint needs.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _checked(_MetadataUnpickler(file).load())
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(Problem(str(path), f"can't be read ({error})", "Load another checkpoint")) from None
        # The base class reads and sets these two in the method that this one replaces.
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _checked(metadata: Any) -> Metadata:
    """Return ``metadata`` if it is of that class and names only files directly in the checkpoint folder."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds something else than metadata")
    # By name rather than by resolving: a name without separators can leave the folder neither by .. nor by a root.
    for info in (metadata.storage_data or {}).values():
        if info.relative_path != Path(info.relative_path).name:
            raise ValueError(f"it names the file {info.relative_path!r}, outside the checkpoint")
    return metadata


# -- planners


class LogicalSavePlanner(DefaultSavePlanner):
    """Plan to write the slices of logical tensors; DCP writes a slice that several ranks hold only once."""

    def __init__(self) -> None:
        # The state dict is flat already, and LogicalTensor is no class that the default planner could unwrap.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the slice at ``index``, rounded to the dtype that the checkpoint stores."""
        logical = self.state_dict[index.fqn]
        tensor: Tensor = logical.__get_tensor_shard__(index).to(logical.dtype)
        return tensor


class LogicalLoadPlanner(DefaultLoadPlanner):
    """Plan to read into the slices of logical tensors, whatever slices they were written as."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict as it is; the default would rebuild it to replace tensors on the meta device."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the memory of the slice at ``index``."""
        tensor: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse an entry that is not a tensor: the default would unpickle it."""
        name = read_item.dest_index.fqn
        raise CheckpointError(Problem(name, "is a pickled object, not a tensor", "Load another checkpoint"))
