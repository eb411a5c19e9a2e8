"""Storage of checkpoints on a file system: a save is committed by renaming its folder.

Everything that is written is flushed to the disk before it is committed. Files that are read are not trusted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from internlm.checkpoint.local_files import LocalFiles, LocalSink, LocalSource, split_file, sync_folder
from internlm.checkpoint.storage import COMPARED_BYTES, MANIFEST, PARTIAL, partial_name

#: Suffixes of folders that a save or a deletion is working on: unfinished, replaced by a new save, being deleted.
ATTEMPT, REPLACED, DELETING = ".tmp-", ".replaced-", ".deleting-"
_SUFFIXES = "|".join(map(re.escape, (ATTEMPT, REPLACED, DELETING)))
# Only names of checkpoints: a folder that a user called `notes.tmp-old` is not ours to delete.
_UNPUBLISHED = re.compile(rf"(?P<checkpoint>(step|snapshot)-[0-9]+)({_SUFFIXES})[A-Za-z0-9_-]+/")
# A partial file of this age, in seconds, belongs to a process that died.
_STALE_PARTIAL = 3600.0
#: File whose lock protects :meth:`LocalStorage.compare_and_swap`, and whose time shows the clock of a file server.
LOCK = ".lock"
_LOCK_SECONDS = 10.0
_SETTLE_SECONDS = 1.0
# Errors of flock on file systems that have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class LocalStorage:
    """Storage on a file system, which may be shared by hosts.

    Files in it are not trusted: symbolic links are not followed, and only regular files are read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder).expanduser().absolute()
        self.location = str(self.root)
        self._files = LocalFiles(self.root)

    def path(self, name: str) -> str:
        """Return the full path of ``name``."""
        return self._files.path(name)

    def prepare(self) -> None:
        """Create the folder, and check that files can be created in it."""
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_folder(descriptor)
            finally:
                os.close(descriptor)
        probe = partial_name("writable")
        os.close(self._files.open(probe, os.O_WRONLY | os.O_CREAT))
        self._files.unlink(probe)

    # -- files

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names in ``folder``; those of folders end with a slash."""
        try:
            with self._files.folder(folder) as descriptor, os.scandir(descriptor) as entries:
                return sorted(
                    f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries
                )
        except FileNotFoundError:
            return []

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of at most ``limit`` bytes."""
        source = self.open(name)
        try:
            if source.size > limit:
                raise OSError(errno.EFBIG, f"expected at most {limit} bytes, got {source.size}", self.path(name))
            content = bytearray(source.size)
            return bytes(content[: source.read_into(0, memoryview(content))])
        finally:
            source.close()

    def open(self, name: str) -> LocalSource:
        """Open a regular file for reading."""
        return LocalSource(self._files.open(name, os.O_RDONLY), self.path(name))

    def create(self, name: str) -> LocalSink:
        """Create a file, and its folders."""
        folder, _ = split_file(name)
        self._files.make_folder(folder)
        return LocalSink(self._files.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file durably under another name, then rename it."""
        folder, file = split_file(name)
        partial = os.path.join(folder, partial_name(file))
        try:
            with self.create(partial) as sink:
                sink.write(memoryview(data))
            self._files.rename(partial, name)
        except OSError:
            with suppress(OSError):
                self._files.unlink(partial)
            raise
        self._files.sync_folder(folder)

    def compare_and_swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Replace the content ``old`` by ``new`` while holding a lock of the operating system."""
        with self._locked() as is_locked:
            if self._compared(name) != old:
                return False
            if new is not None:
                self.write(name, new)
            elif old is not None:
                self._files.unlink(name)
                self._files.sync_folder(split_file(name)[0])
        if is_locked:
            return True
        # Without locks another process may have read the old content, too, and write now. The last one wins.
        time.sleep(_SETTLE_SECONDS)
        return self._compared(name) == new

    def age(self, name: str) -> float:
        """Return the seconds since ``name`` was written, by the clock that sets the times of files."""
        written = self.written(name)
        # The clocks of a file server and of this host may differ, so a file that is touched shows the server's time.
        descriptor = self._files.open(LOCK, os.O_RDWR | os.O_CREAT)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime - written
        finally:
            os.close(descriptor)

    def written(self, name: str) -> float:
        """Return the time of the last change of ``name``."""
        # An open file shows its present time; os.stat may show one that a client of a network file system cached.
        descriptor = self._files.open(name, os.O_RDONLY)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    # -- checkpoints

    def attempt_folder(self, checkpoint: str, attempt: str) -> str:
        """Return ``<checkpoint>.tmp-<attempt>``."""
        return f"{checkpoint}{ATTEMPT}{attempt}"

    def publish(self, checkpoint: str, attempt: str, manifest: bytes, check: Callable[[], None] | None = None) -> None:
        """Write the manifest into the folder of the attempt, and rename the folder to ``checkpoint``."""
        split_file(checkpoint)
        folder = self.attempt_folder(checkpoint, attempt)
        # The folder is not created: if another run has removed it as unfinished, nothing may be published.
        name = f"{folder}/{MANIFEST}"
        with LocalSink(self._files.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), self.path(name)) as sink:
            sink.write(memoryview(manifest))
        self._files.sync_folder(folder)
        if check is not None:
            check()
        # No folder can be renamed onto one with files. The old one stays loadable until the new one is in its place.
        replaced = f"{checkpoint}{REPLACED}{attempt}"
        with suppress(FileNotFoundError):
            self._files.rename(checkpoint, replaced)
        try:
            self._files.rename(folder, checkpoint)
        except OSError:
            with suppress(OSError):
                self._files.rename(replaced, checkpoint)
            raise
        self._files.sync_folder("")
        # The save has succeeded: what cannot be removed now is one of the leftovers, and none that is restored.
        doomed = f"{checkpoint}{DELETING}{attempt}"
        with suppress(OSError):
            self._files.rename(replaced, doomed)
            self.remove(doomed)

    def discard(self, checkpoint: str, attempt: str) -> None:
        """Remove the folder of the attempt, which has another name if it was published."""
        self.remove(self.attempt_folder(checkpoint, attempt))

    def withdraw(self, checkpoint: str, attempt: str) -> None:
        """Rename the folder, so that it is no checkpoint any more, and remove it."""
        split_file(checkpoint)
        doomed = f"{checkpoint}{DELETING}{attempt}"
        self._files.rename(checkpoint, doomed)
        self._files.sync_folder("")
        self.remove(doomed)

    def remove(self, folder: str) -> None:
        """Remove a folder with all of its files; of a symbolic link, remove the link."""
        self._files.remove(folder)

    def leftovers(self, settled: bool = False) -> dict[str, str]:
        """Return the folders whose suffix is that of an unfinished save or deletion; a rename is never late."""
        matches = ((name, _UNPUBLISHED.fullmatch(name)) for name in self.names())
        return {name.rstrip("/"): match["checkpoint"] for name, match in matches if match}

    def restore(self) -> list[str]:
        """Rename replaced checkpoints back, where the rename that was to replace them is missing."""
        restored = []
        for folder, checkpoint in self.leftovers().items():
            if folder.startswith(f"{checkpoint}{REPLACED}") and {checkpoint, f"{checkpoint}/"}.isdisjoint(self.names()):
                self._files.rename(folder, checkpoint)
                self._files.sync_folder("")
                restored.append(checkpoint)
        return restored

    def sweep(self) -> None:
        """Remove partial files of dead processes."""
        for name in filter(PARTIAL.fullmatch, self.names()):
            with suppress(OSError):  # another process may remove it, too
                if self.age(name) > _STALE_PARTIAL:
                    self._files.unlink(name)

    def free_bytes(self) -> int | None:
        """Return the free space of the file system that this user may use."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    # -- compare and swap

    def _compared(self, name: str) -> bytes | None:
        try:
            source = self.open(name)
        except FileNotFoundError:
            return None
        try:
            content = bytearray(COMPARED_BYTES)
            return bytes(content[: source.read_into(0, memoryview(content))])
        finally:
            source.close()

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold an exclusive lock in the ``with`` block; yield False if the file system has none."""
        descriptor = self._files.open(LOCK, os.O_RDWR | os.O_CREAT)
        try:
            yield _lock(descriptor, self.path(LOCK))
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: str) -> bool:
    """Lock an open file until it is closed; return False if its file system has no locks.

    The system releases the lock of a process that dies. One that is stopped keeps it, so the wait for it is bounded.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                message = f"another process has held its lock for {_LOCK_SECONDS:.0f} s"
                raise OSError(errno.ETIMEDOUT, message, path) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
        time.sleep(0.01)
