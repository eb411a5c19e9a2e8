"""Folder that is written as a whole or not at all, on a file system or in an object store.

On a file system it is renamed when it is complete. In an object store, where each file appears at once and no folder
can be renamed, ``config.json`` is written last: without it, no reader takes the folder for a model.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm.checkpoint.local_files import sync_folder
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.storage import Sink, Storage
from internlm.config.schema.fields import is_remote
from internlm.utils.errors import CheckpointError, Problem


@dataclass(frozen=True)
class NewFolder:
    """Folder of a storage that is being written."""

    storage: Storage
    name: str

    def create(self, file: str) -> Sink:
        """Create a file."""
        return self.storage.create(f"{self.name}/{file}")

    def write(self, file: str, content: bytes) -> None:
        """Write a small file."""
        with self.create(file) as sink:
            sink.write(memoryview(content))

    def write_json(self, file: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file for readers."""
        self.write(file, f"{json.dumps(content, indent=2)}\n".encode())


def storage_of(target: Path | str) -> tuple[Storage, str]:
    """Return the storage around a path or an address, and the name of the target there.

    Raises:
        CheckpointError: The address is malformed, or names no folder.
    """
    if isinstance(target, str) and is_remote(target):
        outer, name = split_checkpoint(target)
        return open_storage(outer), name
    path = Path(target)
    return LocalStorage(path.parent), path.name


def check_new(target: Path | str, file: str = "") -> None:
    """Check that nothing is replaced.

    Args:
        target: Path or address.
        file: File without which a folder of an object store is none; empty: any.

    Raises:
        CheckpointError: ``target`` exists.
        OSError: The object store cannot be reached.
    """
    if isinstance(target, str) and is_remote(target):
        storage, name = storage_of(target)
        names = storage.names(name)
        exists = file in names if file else bool(names)
    else:
        exists = os.path.lexists(target)
    if exists:
        raise CheckpointError(Problem(str(target), "exists already", "Choose another name, or remove it"))


@contextmanager
def new_folder(target: Path | str, replaces: bool = False) -> Iterator[NewFolder]:
    """Yield a folder to write to, which becomes ``target`` when the block is complete, or is removed otherwise.

    In an object store the last file that is written must be the one without which the folder is none.

    Args:
        target: Path or address.
        replaces: Whether a folder of this name is replaced.

    Raises:
        CheckpointError: ``target`` exists, and is not to be replaced.
        OSError: It cannot be written.
    """
    if not replaces:
        check_new(target)
    if not (isinstance(target, str) and is_remote(target)):
        with _renamed(Path(target), replaces) as folder:
            yield folder
        return
    storage, name = storage_of(target)
    # With the parts of files that a process left which was killed.
    storage.remove(name)
    try:
        yield NewFolder(storage, name)
    except BaseException:
        with suppress(OSError):
            storage.remove(name)
        raise


@contextmanager
def _renamed(target: Path, replaces: bool) -> Iterator[NewFolder]:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield NewFolder(LocalStorage(partial.parent), partial.name)
        _sync(partial)
        replaced = partial.with_name(f"{partial.name}-replaced")
        if replaces and target.is_dir():
            os.rename(target, replaced)
        # Again: another process may have made it, and renaming replaces an empty folder.
        check_new(target)
        os.rename(partial, target)
        _sync(partial.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(partial)
        raise


def remove_partial(target: Path | str) -> None:
    """Remove what processes left that were killed while they wrote ``target``; call it where no other one does."""
    if isinstance(target, str) and is_remote(target):
        return  # which the next one does
    path = Path(target)
    for partial in path.parent.glob(f".{path.name}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_folder(descriptor)
    finally:
        os.close(descriptor)
