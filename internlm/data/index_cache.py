"""Cache of an index: one file, written by one process of a machine while the others wait, and mapped by all of them.

A cached index decides which bytes become training samples, and its path is predictable. It is therefore used only if
it belongs to this user, root or the owner of the data, nobody else can write to it, and its checksum and key match.

Shapes: C columns of an index, each of any length.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import stat
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internlm.utils.errors import first_of_all_ranks
from internlm.utils.logger import get_logger

_PREFIX = struct.Struct("<8sIIQ")  # magic, CRC-32 of all that follows it, bytes of the header, bytes of all columns
_MAGIC = b"INTINDX\x01"
#: Seconds after which a process no longer waits for another one to build the index, and builds its own.
LONGEST_WAIT = 300.0
_POLL = 0.05  # seconds
LARGEST_HEADER = 1 << 30


class CachedIndex(NamedTuple):
    """Content of a cache: texts and numbers, and columns by name."""

    header: dict[str, Any]
    columns: dict[str, np.ndarray]


class IndexCache:
    """Cache of an index at a path.

    Args:
        path: File that holds the index.
        data_folder: Folder of the data: its owner is trusted, since he could change the data as well.
    """

    def __init__(self, path: Path, data_folder: Path) -> None:
        self._path, self._data_folder = path, data_folder
        self._trusted = {os.geteuid(), 0}
        if path.parent == data_folder:
            with suppress(OSError):
                self._trusted.add(os.stat(data_folder).st_uid)

    def beside(self, name: str) -> IndexCache:
        """Return a cache in the same folder, whose file has ``name`` as its suffix."""
        return IndexCache(self._path.with_name(f"{self._path.name}.{name}"), self._data_folder)

    def load(self, key: str) -> CachedIndex | None:
        """Map the cached index; return None if it is missing, damaged, not trusted, or has another key."""
        try:
            # Neither a link to a file elsewhere, nor a pipe, whose opening would wait for a writer.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < _PREFIX.size:
                return None
            if reason := self._distrust(status):
                _warn_once(f"the cached data index {self._path} is not used: {reason}")
                return None
            # Nobody shortens the file while it is mapped, which would end this process: it is only ever replaced.
            content = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)
        return _decode(content, key)

    def _distrust(self, status: os.stat_result) -> str:
        """Return why the file, or the folder that it is in, may be another user's; an empty text if it is not."""
        folder = os.stat(self._path.parent)
        for what, found in (("it", status), ("its folder", folder)):
            if found.st_uid not in self._trusted:
                return f"{what} belongs to the user with id {found.st_uid}"
            is_folder = stat.S_ISDIR(found.st_mode)
            # Folders that a group shares are usual, and a file that a member put there would be his own.
            others = stat.S_IWOTH if is_folder else stat.S_IWOTH | stat.S_IWGRP
            if found.st_mode & others and not (is_folder and found.st_mode & stat.S_ISVTX):
                return f"other users can write to {what}"
        return ""

    def store(self, key: str, index: CachedIndex) -> bool:
        """Write the index; return False if it cannot be stored."""
        # A process that does not wait any more may write too: each writes its own file, and the last rename wins.
        partial = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("xb") as stream:
                os.fchmod(stream.fileno(), 0o644)  # whatever the umask: one that others can write to is not trusted
                stream.writelines(_encode(key, index))
            os.replace(partial, self._path)
        except OSError as error:
            get_logger().debug("the data index is not cached: %s", error)
            with suppress(OSError):
                partial.unlink()
            return False
        return True

    def load_or_build(
        self, key: str, build: Callable[[], CachedIndex], fits: Callable[[CachedIndex], bool] = lambda found: True
    ) -> CachedIndex:
        """Return the cached index; build and store it if there is none, in one process of the machine.

        Args:
            key: Key of the index.
            build: Function that builds it.
            fits: Whether a cached index with the key is of use.
        """

        def load() -> CachedIndex | None:
            found = self.load(key)
            return found if found is not None and fits(found) else None

        index = load()
        if index is None:
            with self.alone() as can_store:
                index = load() if can_store else None
                if index is None:
                    index = build()
                    if can_store and self.store(key, index):
                        index = load() or index  # which shares memory with other processes
        return index

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Let one process of the machine at a time into the ``with`` block, or after :data:`LONGEST_WAIT` any.

        Yields:
            Whether the index can be stored; if it can't, nobody waits.
        """
        folder = self._path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            get_logger().debug("the data index is not cached: %s", error)
            yield False
            return
        try:
            reason = self._distrust(os.fstat(descriptor))
            if reason:
                _warn_once(f"the data index is not cached in {folder}: {reason.replace('its folder', 'it')}")
            is_usable = not reason and os.access(folder, os.W_OK)
            if is_usable:
                _lock(descriptor)
            yield is_usable
        finally:
            os.close(descriptor)  # which ends the lock


def _warn_once(message: str) -> None:
    if first_of_all_ranks(message):
        get_logger().warning(f"{message}. Set data.shm_path to a folder of your own, or remove it")


def _lock(descriptor: int) -> None:
    """Lock an open folder, so that no file of the lock is left behind; return without a lock after a time limit."""
    limit = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < limit:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL)
        except OSError:
            return  # a network file system without locks of folders
        else:
            return
    get_logger().warning(f"another process has built the data index for {LONGEST_WAIT:.0f} s; building it here too")


# -- file


def _encode(key: str, index: CachedIndex) -> list[bytes | memoryview]:
    layout = {name: [column.dtype.str, len(column)] for name, column in index.columns.items()}
    header = json.dumps({"key": key, "columns": layout, **index.header}).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % 64)  # columns are aligned
    columns = [np.ascontiguousarray(column).data.cast("B") for column in index.columns.values() if len(column)]
    checksum = _checksum(len(header), sum(map(len, columns)), [header, *columns])
    return [_PREFIX.pack(_MAGIC, checksum, len(header), sum(map(len, columns))), header, *columns]


def _checksum(header_size: int, size: int, contents: list[Any]) -> int:
    checksum = zlib.crc32(struct.pack("<IQ", header_size, size))
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    return checksum


def _decode(content: mmap.mmap, key: str) -> CachedIndex | None:
    magic, checksum, header_size, size = _PREFIX.unpack_from(content)
    begin = _PREFIX.size + header_size
    if magic != _MAGIC or header_size > LARGEST_HEADER or len(content) != begin + size:
        return None
    view = memoryview(content)[_PREFIX.size :]
    if _checksum(header_size, size, [view]) != checksum:
        return None
    # What the checksum covers is as this version, or one with the same magic, has written it.
    header: Mapping[str, Any] = json.loads(bytes(view[:header_size]))
    if header["key"] != key:
        return None
    columns = {}
    for name, (dtype, length) in header["columns"].items():
        columns[name] = np.frombuffer(content, dtype, length, begin)
        begin += columns[name].nbytes
    return CachedIndex(dict(header), columns)
