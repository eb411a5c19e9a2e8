"""Storages for tests: patience of their clients, and small files and checkpoints in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internlm.checkpoint.local_storage import LOCK
from internlm.checkpoint.object_client import Patience
from internlm.checkpoint.storage import Storage

HASTY = Patience(connect=5.0, silence=5.0, request=10.0, retry=10.0, first_delay=0.01, longest_delay=0.05)
SHORT = replace(HASTY, connect=0.5, silence=0.5, retry=1.5)
#: Bytes of a part of a large object.
PART = 1000


def put(storage: Storage, name: str, content: bytes = b"content") -> None:
    """Write a file."""
    with storage.create(name) as sink:
        sink.write(memoryview(content))


def manifest_of(attempt: str) -> bytes:
    """Return a manifest that names a file of the attempt."""
    return b'{"files": {"%s/rank-00000.bin": 7}}' % attempt.encode()


def save(storage: Storage, checkpoint: str, attempt: str) -> None:
    """Save a checkpoint whose only file holds the name of the attempt."""
    put(storage, f"{storage.attempt_folder(checkpoint, attempt)}/rank-00000.bin", attempt.encode())
    storage.publish(checkpoint, attempt, manifest_of(attempt))


def save_content(storage: Storage, checkpoint: str, attempt: str, content: bytes) -> None:
    """Save a checkpoint of one file; the manifest repeats its content."""
    put(storage, f"{storage.attempt_folder(checkpoint, attempt)}/rank-00000.bin", content)
    storage.publish(checkpoint, attempt, b"manifest of " + content)


def files_of(root: Path) -> dict[str, bytes]:
    """Return the content by name of all regular files in a folder but the lock."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != LOCK)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
