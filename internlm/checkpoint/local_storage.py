"""Storage of checkpoints on a file system: a save is committed by renaming its folder.

Everything that is written is flushed to the disk before it is committed. Files that are read are not trusted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from internlm.checkpoint.storage import MANIFEST

#: Suffixes of folders that a save or a deletion is working on: unfinished, replaced by a new save, being deleted.
ATTEMPT, REPLACED, DELETING = ".tmp-", ".replaced-", ".deleting-"
_UNPUBLISHED = re.compile(rf"(?P<checkpoint>.+)({re.escape(ATTEMPT)}|{re.escape(REPLACED)}|{re.escape(DELETING)})\w+")


class LocalStorage:
    """Storage on a file system, which may be shared by hosts.

    Files in it are not trusted: symbolic links are not followed, and only regular files are read.
    """

    def __init__(self, folder: str | Path) -> None:
        # The folder itself may be a link: its owner chose it.
        self.root = Path(folder).expanduser().absolute()
        self.location = str(self.root)

    def path(self, name: str) -> str:
        """Return the full path of ``name``."""
        return str(self.root / name)

    def prepare(self) -> None:
        """Create the folder, and check that files can be created in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".writable-{os.getpid()}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC))
        probe.unlink(missing_ok=True)

    # -- files

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names in ``folder``; those of folders end with a slash."""
        try:
            with self._folder(folder) as descriptor, os.scandir(descriptor) as entries:
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
        # Without O_NONBLOCK, opening a named pipe would block until somebody writes to it.
        descriptor = self._open(name, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "expected a regular file", self.path(name))
        return LocalSource(descriptor, status.st_size)

    def create(self, name: str) -> LocalSink:
        """Create a file, and its folders."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        return LocalSink(self._open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))

    def write(self, name: str, data: bytes) -> None:
        """Write a file durably under another name, then rename it."""
        partial = f"{name}.partial-{os.getpid()}"
        try:
            with self.create(partial) as sink:
                sink.write(memoryview(data))
            os.replace(self.root / partial, self.root / name)
        except OSError:
            (self.root / partial).unlink(missing_ok=True)
            raise
        self._sync_folder(os.path.dirname(name))

    def compare_and_swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Replace the content ``old`` by ``new`` while holding a lock of the operating system."""
        with self._locked(f".{name}.lock"):
            try:
                content: bytes | None = self.read(name, limit=1 << 20)
            except FileNotFoundError:
                content = None
            if content != old:
                return False
            if new is None:
                (self.root / name).unlink(missing_ok=True)
            else:
                self.write(name, new)
            return True

    def age(self, name: str) -> float:
        """Return the seconds since ``name`` was written, by the clock that sets the times of files."""
        written = os.stat(self.root / name, follow_symlinks=False).st_mtime
        # The clocks of a file server and of this host may differ, so a new file shows the server's time.
        probe = self.root / f".clock-{os.getpid()}"
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"\n")
            return os.fstat(descriptor).st_mtime - written
        finally:
            os.close(descriptor)
            probe.unlink(missing_ok=True)

    # -- checkpoints

    def attempt_folder(self, checkpoint: str, attempt: str) -> str:
        """Return ``<checkpoint>.tmp-<attempt>``."""
        return f"{checkpoint}{ATTEMPT}{attempt}"

    def publish(self, checkpoint: str, attempt: str, manifest: bytes) -> None:
        """Write the manifest into the folder of the attempt, and rename the folder to ``checkpoint``."""
        folder = self.attempt_folder(checkpoint, attempt)
        with self.create(f"{folder}/{MANIFEST}") as sink:
            sink.write(memoryview(manifest))
        self._sync_folder(folder)
        # No folder can be renamed onto one with files. The old one stays loadable until the new one is in its place.
        replaced = f"{checkpoint}{REPLACED}{attempt}"
        with suppress(FileNotFoundError):
            os.rename(self.root / checkpoint, self.root / replaced)
        os.rename(self.root / folder, self.root / checkpoint)
        self._sync_folder("")
        self.remove(replaced)

    def withdraw(self, checkpoint: str, attempt: str) -> None:
        """Rename the folder, so that it is no checkpoint any more, and remove it."""
        doomed = f"{checkpoint}{DELETING}{attempt}"
        os.rename(self.root / checkpoint, self.root / doomed)
        self._sync_folder("")
        self.remove(doomed)

    def remove(self, folder: str) -> None:
        """Remove a folder with all of its files; of a symbolic link, remove the link."""
        path = self.root / folder
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)

    def leftovers(self) -> dict[str, str]:
        """Return the folders whose suffix is that of an unfinished save or deletion."""
        matches = ((name, _UNPUBLISHED.fullmatch(name.rstrip("/"))) for name in self.names())
        return {name.rstrip("/"): match["checkpoint"] for name, match in matches if match}

    def free_bytes(self) -> int | None:
        """Return the free space of the file system that this user may use."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    # -- descriptors

    @contextmanager
    def _folder(self, folder: str) -> Iterator[int]:
        """Open a folder below the root, without following links below the root."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in filter(None, folder.split("/")):
                outer = descriptor
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(part, flags, dir_fd=outer)
                os.close(outer)
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, name: str, flags: int) -> int:
        folder, _, file = name.rpartition("/")
        with self._folder(folder) as descriptor:
            try:
                return os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=descriptor)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise OSError(errno.ELOOP, "is a symbolic link", self.path(name)) from None
                error.filename = self.path(name)
                raise

    def _sync_folder(self, folder: str) -> None:
        # A rename or a new file changes the folder, which needs an fsync of its own.
        with self._folder(folder) as descriptor:
            os.fsync(descriptor)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the exclusive lock of a file in the ``with`` block; the system releases it if the process dies."""
        descriptor = self._open(name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class LocalSource:
    """Regular file of a file system, open for reading."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self.size = descriptor, size

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``position`` on."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._descriptor, [buffer[filled:]], position + filled)
            if count == 0:
                break
            filled += count
        return filled

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class LocalSink:
    """File of a file system that is being written; it is flushed to the disk when its ``with`` block ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: memoryview) -> None:
        """Append ``data``; without a buffer, so that memory does not grow."""
        while len(data):
            data = data[os.write(self._descriptor, data) :]

    def __enter__(self) -> LocalSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
