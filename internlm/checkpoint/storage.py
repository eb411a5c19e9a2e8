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

_ALLOWED_MODULES = {"torch.distributed.checkpoint.metadata"}
_ALLOWED = {
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
        if (module, name) in _ALLOWED or (module in _ALLOWED_MODULES and "." not in name):
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
                metadata: Metadata = _MetadataUnpickler(file).load()
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(Problem(str(path), f"can't be read ({error})", "Load another checkpoint")) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
