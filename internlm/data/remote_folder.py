"""Folder of token files at an address such as ``s3://BUCKET/FOLDER``, read through copies in a local folder.

Files are copied whole when they are first opened. The copies take up a limited number of bytes: the one that was opened
longest ago is deleted first. Several processes may share the local folder. Credentials and endpoints are found as for
checkpoints.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any

from internlm.data.token_files import SampleError, Stamp
from internlm.utils.errors import DataError, Problem
from internlm.utils.lazy import require
from internlm.utils.secrets import mask_credentials

#: Seconds for a connection, and of silence, after which a request to S3 is sent again.
_S3 = {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 8}}
_COPIES, _LOCKS, _PARTIAL = "copies", "locks", ".partial"
_CHUNK = 1 << 24


class RemoteFolder:
    """Remote folder, with copies of its files below a local one.

    Args:
        address: Address that ``fsspec`` accepts, such as ``s3://BUCKET/FOLDER``.
        cache_folder: Local folder, which may be shared with other addresses and other runs.
        limit: Bytes that all copies in ``cache_folder`` may take up; a single file may be larger.

    Raises:
        DataError: The address is not known, or the local folder cannot be made.
        UserError: A package that the address needs is not installed.
    """

    def __init__(self, address: str, cache_folder: Path, limit: int) -> None:
        self.address = address.removeprefix("boto3:").rstrip("/")
        protocol = self.address.partition("://")[0]
        require("s3fs" if protocol == "s3" else "fsspec", self.address, "pip install 'InternEvo[s3]'")
        self._limit = limit
        self._copies, self._locks = cache_folder / _COPIES, cache_folder / _LOCKS
        # One folder for each address: files of two addresses may have the same name.
        self.folder = self._copies / _digest(self.address)
        try:
            self._files = _file_system(protocol, os.getpid())
            for folder in (self.folder, self._locks):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot be made ({error.strerror})"
            raise DataError(
                Problem(str(cache_folder), message, "Set data.cache_folder to a writable folder")
            ) from error
        except (ValueError, ImportError) as error:
            todo = "Use s3://BUCKET/FOLDER, or another address that fsspec can open"
            raise DataError(self._problem("", f"cannot be opened ({_line(error)})", todo)) from error

    def _problem(
        self, name: str, message: str, todo: str = "Check the address, the credentials and the network"
    ) -> Problem:
        return Problem(mask_credentials(f"{self.address}/{name}".rstrip("/")), message, todo)

    def list(self) -> dict[str, Stamp]:
        """Return size and version of each file by its path relative to the folder.

        Raises:
            DataError: The folder cannot be listed.
        """
        root = self._files._strip_protocol(self.address).rstrip("/")
        try:
            found = self._files.find(root, detail=True)
        # Each file system raises errors of its own.
        except Exception as error:
            raise DataError(self._problem("", f"cannot be listed ({_line(error)})")) from error
        return {
            path[len(root) :].strip("/"): _stamp(info)
            for path, info in found.items()
            if info.get("type") == "file" and path != root
        }

    def open(self, path: Path, stamp: Stamp) -> FileIO:
        """Open the copy of a file, and make it first if there is none of this version.

        Args:
            path: Path of the copy, below ``folder``.
            stamp: Size and version, as listed.

        Raises:
            SampleError: The file has changed, or cannot be read or copied.
        """
        name = path.relative_to(self.folder).as_posix()
        try:
            with self._locked(_digest(str(path))[:2]):  # 256 locks: a file for each would be as many again
                return self._open_copy(path, stamp) or self._copy(name, path, stamp)
        except OSError as error:
            message = f"the copy {path} cannot be written ({error.strerror or error})"
            raise SampleError(message, "Free space in data.cache_folder, or lower data.cache_gib") from error

    def discard(self, path: Path) -> None:
        """Delete the copy of a file, which is then made again when it is opened."""
        with suppress(OSError):
            path.unlink()

    def _open_copy(self, path: Path, stamp: Stamp) -> FileIO | None:
        try:
            stream = FileIO(path)
        except FileNotFoundError:
            return None
        found = os.fstat(stream.fileno())
        if (found.st_size, found.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            stream.close()
            return None
        # The access time is ours, whatever the file system does with it: when the copy was last opened.
        os.utime(path, ns=(time.time_ns(), stamp.mtime_ns))
        return stream

    def _copy(self, name: str, path: Path, stamp: Stamp) -> FileIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
        try:
            with partial.open("xb") as target:
                fcntl.flock(target, fcntl.LOCK_EX)  # until it is closed: others see that it is in use
                os.truncate(target.fileno(), stamp.size)  # from now on its bytes count
                self._make_room()
                self._download(name, target, stamp)
                target.flush()
                os.utime(partial, ns=(time.time_ns(), stamp.mtime_ns))
                # Once it has its name, another process may delete it.
                stream = FileIO(partial)
                os.replace(partial, path)
            self._make_room()  # again, since copies that were in progress could not be deleted
            return stream
        finally:
            with suppress(OSError):
                partial.unlink()

    def _download(self, name: str, target: Any, stamp: Stamp) -> None:
        url = f"{self._files._strip_protocol(self.address).rstrip('/')}/{name}"
        where = f"{self.address}/{name}"
        try:
            info = self._files.info(url)
            if _stamp(info) != stamp:
                message = f"{where} has changed since it was listed ({stamp.size} bytes then, {info['size']} now)"
                raise SampleError(message, "Restore the original file, or start a new run")
            with self._files.open(url, "rb", block_size=_CHUNK, cache_type="readahead") as source:
                shutil.copyfileobj(source, target, _CHUNK)
        except (SampleError, MemoryError):
            raise
        except Exception as error:
            message = f"{where} cannot be read ({_line(error)})"
            raise SampleError(message, "Check the address, the credentials and the network") from error
        if target.tell() != stamp.size:
            raise SampleError(f"{where} has {target.tell()} bytes, {stamp.size} are listed", "Start again")

    def _make_room(self) -> None:
        """Delete copies, those opened longest ago first, until all others are within the limit."""
        with self._locked("all"):
            copies = sorted(self._all_copies(), key=lambda copy: copy[1].st_atime_ns)
            total = sum(found.st_size for _, found in copies)
            for path, found in copies:
                if total <= self._limit:
                    return
                # A process that has a file open keeps its content.
                if path.name.endswith(_PARTIAL) and _is_locked(path):
                    continue
                with suppress(OSError):
                    path.unlink()
                    total -= found.st_size

    def _all_copies(self) -> Iterator[tuple[Path, os.stat_result]]:
        for here, _, names in os.walk(self._copies):
            for name in names:
                path = Path(here, name)
                with suppress(OSError):
                    if not name.startswith(".internlm_index"):
                        yield path, path.stat()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock among the threads and processes that use the local folder."""
        with (self._locks / name).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process that holds it, whose requests have a time limit
            yield


@functools.cache
def _file_system(protocol: str, process: int) -> Any:
    """Return the file system of fsspec for a protocol, shared by the folders of a process: S3's takes long to make."""
    options: dict[str, Any] = {"config_kwargs": _S3} if protocol == "s3" else {}
    # fsspec's own cache has an instance for each thread, and its listings would be out of date.
    return importlib.import_module("fsspec").filesystem(
        protocol, skip_instance_cache=True, use_listings_cache=False, **options
    )


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _stamp(info: dict[str, Any]) -> Stamp:
    """Return size and version of a remote file; the version becomes the modification time of its copy."""
    tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
    version = next((tag.isoformat() if isinstance(tag, datetime) else str(tag) for tag in tags if tag), "")
    # A time between 1970 and 2001 that stands for the version: copies have times of their own.
    digest = int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest(), "big")
    return Stamp(int(info["size"]), digest % 10**9 * 10**9, 0)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _line(error: Exception) -> str:
    text = mask_credentials(" ".join(str(error).split()))[:300]
    return text or type(error).__name__
