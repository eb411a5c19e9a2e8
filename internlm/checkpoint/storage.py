"""Writing ``torch.distributed.checkpoint`` files, and reading them without trusting them.

Its metadata is a pickle, and a pickle may run anything. The reader here builds only the handful of plain classes
that metadata is made of.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from internlm.utils.errors import CheckpointError, Problem

_METADATA = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta",
)  # fmt: skip
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class PlainWriter(dcp.FileSystemWriter):
    """A writer whose metadata holds nothing of the machine that wrote it."""

    def storage_meta(self) -> StorageMeta:
        """Without the folder's path, which would be a class for the reader to build."""
        return StorageMeta(save_id=self.save_id)


class SafeReader(dcp.FileSystemReader):
    """A reader that executes nothing it finds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; raises :class:`CheckpointError` where it is damaged or hostile."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _checked(_MetadataUnpickler(file).load())
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(Problem(str(path), f"can't be read ({error})", "Load another checkpoint")) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _checked(metadata: Any) -> Metadata:
    """``metadata``, if it is that, and speaks of files in its own folder alone."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds something else than metadata")
    for info in (metadata.storage_data or {}).values():
        if info.relative_path != Path(info.relative_path).name:
            raise ValueError(f"it names the file {info.relative_path!r}, outside the checkpoint")
    return metadata
