"""Reader of format 1, which earlier versions wrote, and whose files it treats as untrusted.

The format is that of ``torch.distributed.checkpoint`` (DCP), with the file ``state.json`` and the commit mark
``COMMITTED``. DCP's metadata is a pickle, and unpickling can execute any code, so this reader constructs only the few
plain classes that metadata consists of. DCP loads tensors with ``weights_only``. There are no checksums: a file that is
missing or too short is found, changed bytes are not: only :func:`archive_problem`, which reads whole files, finds them.
"""

from __future__ import annotations

import errno
import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.manifest import uncovered
from internlm.checkpoint.run_state import LARGEST_STATE
from internlm.checkpoint.storage import Source, Storage
from internlm.utils.errors import DamagedCheckpointError, Problem
from internlm.utils.torch_private import CHECKPOINT_METADATA_NAMES

STATE_FILE, COMMIT_FILE, METADATA_FILE = "state.json", "COMMITTED", ".metadata"
#: Files of a checkpoint besides those with tensors.
FILES = (STATE_FILE, COMMIT_FILE, METADATA_FILE)
#: Size limit of the metadata in bytes.
LARGEST_METADATA = 1 << 28
#: Opcodes that allocate memory of any size, or that call code by other ways than the names allowed below.
_UNNEEDED_OPCODES = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID",
                     "BINPERSID"}  # fmt: skip

# Exact pairs of module and name: attributes of allowed modules (``dataclass``, ``os``) would permit code execution.
_ALLOWED = {
    *CHECKPOINT_METADATA_NAMES,
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


def read_state(folder: Path) -> bytes:
    """Return the content of the state file.

    Raises:
        DamagedCheckpointError: The file is missing or cannot be read.
    """
    return _read(folder, STATE_FILE, LARGEST_STATE)


def damaged_files(folder: Path, metadata: Metadata) -> Iterator[Problem]:
    """Yield a problem for each tensor file that is no regular file, or shorter than ``metadata`` requires."""
    ends: dict[str, int] = {}
    for entry in (metadata.storage_data or {}).values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        if size < end:
            message = f"expected at least {end} bytes according to {METADATA_FILE}, got {size}"
            yield Problem(str(path), message, "Choose an older checkpoint")


def index_problems(where: str, metadata: Metadata) -> Iterator[Problem]:
    """Yield a problem for each tensor whose chunks do not cover it once, or have no place in a file."""
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        message = uncovered(stored.size, [(chunk.offsets, chunk.sizes) for chunk in stored.chunks])
        for chunk in stored.chunks:
            if MetadataIndex(name, chunk.offsets) not in (metadata.storage_data or {}):
                message = message or f"the index names no file for the chunk at {list(chunk.offsets)}"
        if message:
            yield Problem(f"{where}: {name}", message, "Choose an older checkpoint")


def archive_problem(storage: Storage, name: str, info: Any) -> str:
    """Read the archive of one chunk, and return what is wrong with it, or an empty string.

    Args:
        storage: Storage of the checkpoint.
        name: Its folder.
        info: Place of the archive: file, offset and length, a value of ``Metadata.storage_data``.
    """
    where = f"bytes {info.offset} to {info.offset + info.length}"
    try:
        source = storage.open(f"{name}/{info.relative_path}")
        try:
            with zipfile.ZipFile(io.BufferedReader(_FileRange(source, info.offset, info.length), 1 << 20)) as archive:
                damaged = archive.testzip()
        finally:
            source.close()
    except OSError as error:
        return f"{where} cannot be read ({error.strerror or error})"
    except Exception as error:  # damaged archives raise nearly anything
        return f"{where} are no archive of a tensor ({error})"
    return "" if damaged is None else f"{where} differ from those that were saved ({damaged} has another CRC-32)"


class _FileRange(io.RawIOBase):
    """Bytes of a file from ``start`` on, as a file."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        self._source, self._start, self._size, self._position = source, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if self._position < 0:
            raise OSError(errno.EINVAL, "negative position in an archive")
        return self._position

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer)[: max(self._size - self._position, 0)]
        count = self._source.read_into(self._start + self._position, memory)
        self._position += count
        return count


def _read(folder: Path, name: str, limit: int) -> bytes:
    try:
        return LocalStorage(folder).read(name, limit)
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DamagedCheckpointError(Problem(str(folder / name), message, "Choose an older checkpoint")) from None


class SafeReader(dcp.FileSystemReader):
    """DCP reader that executes no code from the checkpoint and reads no file outside of it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata`` with the restricted unpickler.

        Raises:
            DamagedCheckpointError: The metadata is damaged, or refers to a class or a file that no checkpoint needs.
        """
        path = Path(self.path) / METADATA_FILE
        content = _read(path.parent, METADATA_FILE, LARGEST_METADATA)
        try:
            _check_sizes(content)
            metadata = _checked(_MetadataUnpickler(io.BytesIO(content)).load())
        except Exception as error:  # damaged pickles raise nearly anything
            problem = Problem(str(path), f"cannot be read ({error})", "Choose an older checkpoint")
            raise DamagedCheckpointError(problem) from None
        # The base method, which this one replaces, sets these two attributes for later use by the base class.
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_sizes(content: bytes) -> None:
    """Check that no object of the pickle claims more bytes than there are: unpickling would allocate them first."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _UNNEEDED_OPCODES:
            raise ValueError(f"refused the opcode {opcode.name}, which no checkpoint needs")
        if isinstance(argument, int) and opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"refused the memo index {argument}")


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
