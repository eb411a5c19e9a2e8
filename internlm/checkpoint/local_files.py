"""Files and folders below a root folder, which are opened without following symbolic links.

Every operation starts at a descriptor of the root and opens one folder after the other, so that a link that is found on
the way, or is put there in between, is an error and never followed. Errors name the full path.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class LocalFiles:
    """Operations on names below the folder ``root``, which may be a link itself: its owner chose it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> str:
        """Return the full path of ``name``, for messages."""
        return str(self.root / name)

    @contextmanager
    def folder(self, name: str, file: str = "") -> Iterator[int]:
        """Open a folder and return its descriptor for the ``with`` block.

        Args:
            name: Name of the folder; "" is the root.
            file: File in the folder that the block works on: errors of the block name its path.
        """
        parts, inner = split_name(name), split_name(file)
        path, descriptor = self.root, -1
        try:
            descriptor = os.open(self.root, _FOLDER)
            for part in parts:
                path, outer = path / part, descriptor
                try:
                    descriptor = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=outer)
                except NotADirectoryError:
                    _refuse_link(part, outer)
                    raise
                finally:
                    if descriptor != outer:
                        os.close(outer)
            path = path.joinpath(*inner)
            yield descriptor
        except OSError as error:
            _name_path(error, str(path))
            raise
        finally:
            if descriptor != -1:
                os.close(descriptor)

    def make_folder(self, name: str) -> None:
        """Create a folder and those around it below the root, where they do not exist."""
        outer = ""
        for part in split_name(name):
            with self.folder(outer, part) as descriptor, suppress(FileExistsError):
                os.mkdir(part, dir_fd=descriptor)
            outer = f"{outer}/{part}".lstrip("/")

    def open(self, name: str, flags: int) -> int:
        """Open a regular file and return its descriptor."""
        folder, file = split_file(name)
        with self.folder(folder, file) as outer:
            try:
                # Without O_NONBLOCK, opening a named pipe would block until another process opens its other end.
                descriptor = os.open(
                    file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode=0o666, dir_fd=outer
                )
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EMLINK):
                    _refuse_link(file, outer)
                raise
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "expected a regular file")
            return descriptor

    def rename(self, old: str, new: str) -> None:
        """Rename a file, a link or a folder; ``old`` and ``new`` are in the same folder."""
        folder, file = split_file(old)
        _, target = split_file(new)
        with self.folder(folder, file) as descriptor:
            os.rename(file, target, src_dir_fd=descriptor, dst_dir_fd=descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file or a link."""
        folder, file = split_file(name)
        with self.folder(folder, file) as descriptor:
            os.unlink(file, dir_fd=descriptor)

    def remove(self, name: str) -> None:
        """Remove a folder with all of its files, whether it exists or not; of a symbolic link, remove the link."""
        folder, file = split_file(name.rstrip("/"))
        with suppress(FileNotFoundError), self.folder(folder, file) as descriptor:
            _remove(file, descriptor)

    def sync_folder(self, name: str) -> None:
        """Flush the entries of a folder to the disk: a rename or a new file changes the folder, not the file."""
        with self.folder(name) as descriptor:
            sync_folder(descriptor)


class LocalSource:
    """Regular file of a file system, open for reading."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor, self._path = descriptor, path
        self.size = os.fstat(descriptor).st_size

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``position`` on."""
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[filled:]], position + filled)
            except OSError as error:
                _name_path(error, self._path)
                raise
            if count == 0:
                break
            filled += count
        return filled

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class LocalSink:
    """File of a file system that is being written; it is flushed to the disk when its ``with`` block ends."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor, self._path = descriptor, path

    def write(self, data: memoryview) -> None:
        """Append ``data``; without a buffer, so that memory does not grow."""
        try:
            while len(data):
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            _name_path(error, self._path)
            raise

    def __enter__(self) -> LocalSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        except OSError as failure:
            _name_path(failure, self._path)
            raise
        finally:
            os.close(self._descriptor)


def split_name(name: str) -> list[str]:
    """Split a name at its slashes.

    Raises:
        OSError: The name is absolute, or leads out of the folder.
    """
    parts = name.split("/") if name else []
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise OSError(errno.EINVAL, "expected a name inside the folder of checkpoints", name)
    return parts


def split_file(name: str) -> tuple[str, str]:
    """Split the name of a file into those of its folder and of the file there.

    Raises:
        OSError: The name is empty, absolute, or leads out of the folder.
    """
    parts = split_name(name)
    if not parts:
        raise OSError(errno.EINVAL, "expected the name of a file", name)
    return "/".join(parts[:-1]), parts[-1]


def sync_folder(descriptor: int) -> None:
    """Flush the entries of an open folder to the disk; some network file systems cannot, and are left alone."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _name_path(error: OSError, path: str) -> None:
    """Set the path of an error of a function that takes descriptors, unless an inner call did."""
    if not (isinstance(error.filename, str) and os.path.isabs(error.filename)):
        error.filename = path


def _refuse_link(name: str, folder: int) -> None:
    """Raise an error if ``name`` is a symbolic link; the messages of the system differ, and none of them says so."""
    if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", name) from None


def _remove(name: str, folder: int) -> None:
    """Remove a file, a link, or a folder with its content."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=folder)
        return
    descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    try:
        for inner in os.listdir(descriptor):
            # Another process may be removing the same leftovers.
            with suppress(FileNotFoundError):
                _remove(inner, descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=folder)
