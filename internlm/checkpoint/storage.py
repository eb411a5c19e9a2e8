"""Storage of checkpoints: the operations that saving and loading need, on a file system or in an object store.

Names are relative to the storage's location, with slashes. A storage holds *checkpoints* by name (``step-40``,
``snapshot-0``). Each save writes its files into the folder of an *attempt*, and publishes them by a manifest:

=============  ===========================  ==============================================
storage        files of an attempt          published by
=============  ===========================  ==============================================
file system    ``step-40.tmp-<attempt>/``   renaming this folder to ``step-40/``
object store   ``step-40/<attempt>/``       a conditional PUT of ``step-40/manifest.json``
=============  ===========================  ==============================================
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

#: File that marks a committed checkpoint, and that lists and verifies its other files.
MANIFEST = "manifest.json"
#: Bytes of a file that :meth:`Storage.compare_and_swap` compares; of a larger file, it compares the first ones.
COMPARED_BYTES = 1 << 16
#: Names of small files that are being written, and of files that a check writes and removes.
PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")


def partial_name(name: str) -> str:
    """Return a name that no other process uses, for the file ``name`` while it is written."""
    return f".{name}.partial-{secrets.token_hex(4)}"


class Source(Protocol):
    """File that is open for reading."""

    size: int

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``position`` on; return the number of bytes read, fewer only at the end of the file."""

    def close(self) -> None:
        """Close the file."""


class Sink(Protocol):
    """File that is being written; leaving its ``with`` block makes it durable, an exception there abandons it."""

    def write(self, data: memoryview) -> None:
        """Append ``data``."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Storage(Protocol):
    """Folder of checkpoints, on a file system or in an object store.

    All methods raise ``OSError`` where the storage fails, and ``FileNotFoundError`` for names that do not exist.
    """

    location: str
    """Path or address, for messages."""

    def path(self, name: str) -> str:
        """Return the full path or address of ``name``, for messages."""

    def prepare(self) -> None:
        """Create the folder if it does not exist, and check that it can be written to."""

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names in ``folder``; those of folders end with a slash. Empty if there is no folder."""

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes; a larger one raises ``OSError`` (EFBIG)."""

    def open(self, name: str) -> Source:
        """Open a file for reading."""

    def create(self, name: str) -> Sink:
        """Create a file, and its folders."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically and durably, replacing an older one."""

    def compare_and_swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Replace the content ``old`` of a small file by ``new``, if it still is ``old``; None: there is no file.

        Returns:
            Whether the file was replaced. Of several processes that compete, at most one replaces it.
        """

    def age(self, name: str) -> float:
        """Return the seconds since ``name`` was written, both times by the clock of the storage."""

    def written(self, name: str) -> float:
        """Return the time at which ``name`` was written, in seconds since the epoch; nothing is changed."""

    def attempt_folder(self, checkpoint: str, attempt: str) -> str:
        """Return the name of the folder for the files of an attempt to save ``checkpoint``."""

    def publish(self, checkpoint: str, attempt: str, manifest: bytes, check: Callable[[], None] | None = None) -> None:
        """Commit an attempt whose other files are durable; replace an older checkpoint of this name.

        Args:
            checkpoint: Name of the checkpoint.
            attempt: Name of the attempt.
            manifest: Content of the manifest.
            check: Function called right before the commit; it raises unless this run owns the folder.
        """

    def discard(self, checkpoint: str, attempt: str) -> None:
        """Remove the files of an attempt that failed, unless it was published after all, or may still be."""

    def withdraw(self, checkpoint: str, attempt: str) -> None:
        """Delete a committed checkpoint; from the first moment on it does not count as committed.

        Raises:
            OSError: It cannot be deleted. If its files alone are left, they are one of the :meth:`leftovers`.
        """

    def remove(self, folder: str) -> None:
        """Remove a folder with all of its files, or a file, whether it exists or not."""

    def leftovers(self, settled: bool = False) -> dict[str, str]:
        """Return the folders of unfinished saves and deletions, with the name of the checkpoint of each.

        Args:
            settled: Leave out those that a request on its way could still commit in place of a checkpoint.
        """

    def sweep(self) -> None:
        """Remove temporary files and parts of files that processes left; the owner calls it when it starts."""

    def restore(self) -> list[str]:
        """Give checkpoints that an unfinished save was about to replace their names back; return the names."""

    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if it is unknown or unlimited."""
