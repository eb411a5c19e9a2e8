"""Files of a folder of other software, on a file system or in an object store; they are read, and never written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Protocol

from internlm.checkpoint.local_files import LocalSource
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.storage import Source, Storage
from internlm.config.schema.fields import is_remote

#: Bytes that a request to an object store reads ahead.
BLOCK_BYTES = 8 << 20


class FolderFiles(Protocol):
    """Files of one folder. All methods raise ``OSError``."""

    location: str
    """Path or address of the folder, for messages."""

    def names(self) -> list[str]:
        """Return the sorted names of the files."""

    def open(self, name: str) -> Source:
        """Open a file for reading."""

    def path(self, name: str) -> str:
        """Return the path or address of a file, for messages."""


def files_of(location: Path | str) -> FolderFiles:
    """Return the files of the folder at a path, or at an address of an object store.

    Raises:
        CheckpointError: The address is malformed, or names no folder.
    """
    if isinstance(location, str) and is_remote(location):
        outer, name = split_checkpoint(location)
        return StoredFolder(open_storage(outer), name)
    return LocalFolder(Path(location))


class LocalFolder:
    """Files of a folder of a file system. Links are followed: caches of downloads have them."""

    def __init__(self, path: Path) -> None:
        self._path, self.location = path, str(path)

    def names(self) -> list[str]:
        """Return the sorted names of the files."""
        return sorted(os.listdir(self._path))

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return str(self._path / name)

    def open(self, name: str) -> LocalSource:
        """Open a regular file for reading."""
        # Without O_NONBLOCK, opening a named pipe would block.
        descriptor = os.open(self._path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is not a regular file", self.path(name))
        return LocalSource(descriptor, self.path(name))


class StoredFolder:
    """Files of a folder in a storage."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder, self.location = storage, folder, storage.path(folder)

    def names(self) -> list[str]:
        """Return the sorted names of the files."""
        names = self._storage.names(self._folder)
        if not names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location)
        return names

    def path(self, name: str) -> str:
        """Return the address of a file."""
        return self._storage.path(f"{self._folder}/{name}")

    def open(self, name: str) -> Source:
        """Open a file for reading."""
        return _BlockSource(self._storage.open(f"{self._folder}/{name}"))


class _BlockSource:
    """File that is read in blocks: a request for each row of a box would take longer than all bytes between them."""

    def __init__(self, source: Source) -> None:
        self._source, self.size = source, source.size
        self._block, self._start = memoryview(b""), 0

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``position`` on."""
        filled, length = 0, min(len(buffer), max(self.size - position, 0))
        while filled < length:
            at = position + filled
            if not self._start <= at < self._start + len(self._block):
                self._load(at)
            offset = at - self._start
            part = self._block[offset : offset + length - filled]
            buffer[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def _load(self, position: int) -> None:
        # Aligned, so that boxes beside one another have blocks in common.
        self._start = position // BLOCK_BYTES * BLOCK_BYTES
        block = memoryview(bytearray(min(BLOCK_BYTES, self.size - self._start)))
        count = self._source.read_into(self._start, block)
        if count < len(block):
            raise OSError(errno.EIO, "was cut short while it was read")
        self._block = block

    def close(self) -> None:
        """Close the file."""
        self._block = memoryview(b"")
        self._source.close()
