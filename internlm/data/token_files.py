"""Token files: how they are found, opened and read with checks, whatever their format.

A format says how the files of a folder pair up, where each sample lies in its file, and how tokens are decoded. Every
read goes through :class:`OpenFile`, which notices a file that has changed since it was indexed.

Shapes: n samples in a file.
"""

from __future__ import annotations

import itertools
import os
import stat
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from internlm.utils.errors import DataError, Problem, first_of_all_ranks
from internlm.utils.logger import get_logger

#: Bytes of a file that share a checksum. Small, because a read of a short sample is extended to whole blocks.
CHECK_BLOCK = 1 << 14
#: Names of each kind in the log of what was left out.
MOST_NAMED = 5
OTHER_SUFFIX = "with another suffix"
RESTORE = "Restore the original file, or start a new run"


class Stamp(NamedTuple):
    """Size and times of a file. A change of the content changes the change time even if the other two are restored."""

    size: int  # bytes
    mtime_ns: int
    ctime_ns: int


class DataFile(NamedTuple):
    """File of tokens, as it was when the index was opened."""

    path: Path
    name: str  # relative to the folder
    stamp: Stamp
    format: TokenFormat
    side_stamp: Stamp | None = None  # of the file beside it that lists the samples, if the format has one
    remote: Remote | None = None  # where the files are copied from when they are opened; None: they are local

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stamp.size

    @property
    def side(self) -> Path:
        """Path of the file that lists the samples; that of the token file itself if the format has none."""
        return self.format.side(self.path) or self.path

    def open(self) -> FileIO:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
            SampleError: It cannot be copied from its remote.
        """
        return FileIO(self.path) if self.remote is None else self.remote.open(self.path, self.stamp)

    def open_side(self) -> FileIO:
        """Open the file that lists the samples; its errors are those of :meth:`open`."""
        if self.remote is None or self.side_stamp is None:
            return FileIO(self.side)
        return self.remote.open(self.side, self.side_stamp)

    @property
    def where(self) -> str:
        """Path, or address of a remote file, for messages."""
        return str(self.path) if self.remote is None else f"{self.remote.address}/{self.name}"

    @property
    def stem(self) -> str:
        """Name without the suffix of the format, which stays the same if the file is converted."""
        return self.name.removesuffix(self.format.suffix)

    @property
    def type_name(self) -> str:
        """Dataset type: the first-level sub-folder, or ``default`` for a file directly in the folder."""
        return self.name.split("/")[0] if "/" in self.name else "default"


class Span(NamedTuple):
    """Place of a sample in its file."""

    offset: int  # bytes
    size: int  # bytes
    length: int  # tokens


class SampleError(Exception):
    """Error of one sample: what is wrong, and what to do. Whoever knows the file and the row adds them."""

    def __init__(self, message: str, todo: str) -> None:
        super().__init__(message)
        self.message, self.todo = message, todo

    def at(self, file: DataFile, row: int, offset: int) -> DataError:
        """Return the error for the user, which names the file, the row and the byte offset."""
        where = f"{file.where}:{row + 1} (sample {row}, byte {offset})"
        return DataError(Problem(where, self.message, self.todo))


class Remote(Protocol):
    """Protocol for a remote folder, of which the files at hand are copies."""

    address: str
    folder: Path  # of the copies

    def list(self) -> dict[str, Stamp]:
        """Return the stamp of each file by its path relative to the folder."""

    def open(self, path: Path, stamp: Stamp) -> FileIO:
        """Open the copy of a file, and make it first if there is none."""

    def discard(self, path: Path) -> None:
        """Delete the copy of a file, which is made again when it is opened."""


class TokenReader(Protocol):
    """Protocol for the decoder of one open file. Threads call it at the same time."""

    def read(self, span: Span, begin: int, stop: int) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, integers [stop - begin], without a check of the ids.

        Raises:
            SampleError: The file has changed, or the sample is damaged.
        """


class TokenFormat(Protocol):
    """Protocol for a format of token files."""

    name: str
    suffix: str
    remake: str  # what to do about a damaged file

    def side(self, path: Path) -> Path | None:
        """Return the path of the file beside ``path`` that lists its samples; None if ``path`` does so itself."""

    def samples(self, file: DataFile) -> np.ndarray:
        """Return byte offset, token count and size in bytes of each sample, int64 [3, n], in the order of the offsets.

        Raises:
            DataError: The file is damaged. No more than a few times its size is allocated.
        """

    def reader(self, opened: OpenFile) -> TokenReader:
        """Return the decoder of an open file."""


class OpenFile:
    """Open token file, which is closed once nothing refers to it any more.

    Plain reads rather than a memory map: truncating a file kills a process that has mapped it (SIGBUS), while a read
    returns too few bytes.

    Args:
        file: The file, as it was indexed.
        checksums: CRC-32 of each :data:`CHECK_BLOCK` bytes, which reads are compared with; None: no comparison.

    Raises:
        SampleError: It cannot be opened.
    """

    def __init__(self, file: DataFile, checksums: np.ndarray | None = None) -> None:
        self.file, self._checksums = file, checksums
        # All that were opened: another thread may still read the first one when a second one replaces it.
        self._streams: list[FileIO] = []
        self._open()

    def _open(self) -> None:
        try:
            self._streams.append(self.file.open())
        except OSError as error:
            raise _unreadable(error) from error
        self._fd = self._streams[-1].fileno()

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes, and check that the file has not changed since it was indexed.

        Raises:
            SampleError: The file has changed or cannot be read.
        """
        first, skipped = (divmod(offset, CHECK_BLOCK)) if self._checksums is not None else (0, 0)
        begin, wanted = offset - skipped, size + skipped
        if self._checksums is not None:
            wanted = min(-(-wanted // CHECK_BLOCK) * CHECK_BLOCK, self.file.size - begin)
        try:
            found = os.fstat(self._fd)  # of the open file: detects a replaced file of the same name
            # Modification time, not change time: a new name or mode of the file would end the run.
            content = os.pread(self._fd, wanted, begin)  # threads share the descriptor: no seek
            while 0 < len(content) < wanted and (
                more := os.pread(self._fd, wanted - len(content), begin + len(content))
            ):
                content += more  # one call returns at most 2 GiB
        except OSError as error:
            raise _unreadable(error) from error
        stamp = self.file.stamp
        if found.st_mtime_ns != stamp.mtime_ns or found.st_size != stamp.size or len(content) != wanted:
            message = f"the file has changed since it was opened ({stamp.size} bytes then, {found.st_size} bytes now)"
            raise SampleError(message, RESTORE)
        if self._checksums is None:
            return content
        wrong = _differing(content, self._checksums[first:])
        if wrong is not None and self.file.remote is not None:
            self.file.remote.discard(self.file.path)  # the copy may be damaged, and its remote not
            self._open()
            content = OpenFile(self.file).read(begin, wanted)
            wrong = _differing(content, self._checksums[first:])
        if wrong is not None:
            place = begin + wrong * CHECK_BLOCK
            message = f"the content differs from what was indexed, in the {CHECK_BLOCK} bytes from byte {place}"
            raise SampleError(message, RESTORE)
        return content[skipped : skipped + size]


def _unreadable(error: OSError) -> SampleError:
    return SampleError(f"cannot be read ({error.strerror or error})", "Restore the file and resume")


def block_checksums(content: bytes) -> list[int]:
    """Return the CRC-32 of each :data:`CHECK_BLOCK` bytes of ``content``."""
    view = memoryview(content)
    return [zlib.crc32(view[at : at + CHECK_BLOCK]) for at in range(0, len(content), CHECK_BLOCK)]


def _differing(content: bytes, expected: np.ndarray) -> int | None:
    found = block_checksums(content)
    same = np.array(found, np.uint32) == expected[: len(found)]
    return None if same.all() else int(same.argmin())


# -- finding files


def is_prefix(path: Path, formats: Sequence[TokenFormat]) -> bool:
    """Return whether ``path`` is that of a token file without its suffix."""
    return any(path.with_name(path.name + form.suffix).is_file() for form in formats if path.name)


def find_files(folder: Path, formats: Sequence[TokenFormat], remote: Remote | None = None) -> list[DataFile]:
    """Return all token files under ``folder``, sorted by their path relative to ``folder`` without the suffix.

    If ``folder`` is the path of a file without its suffix, only this file is returned. With an ``remote``, ``folder``
    is that of the copies, and the files are those of the remote.

    Raises:
        DataError: The folder is missing, contains no token file, a file lacks the one beside it, two files differ only
            in their suffix, or a name has control characters.
    """
    only = None
    if not folder.is_dir() and is_prefix(folder, formats):
        folder, only = folder.parent, folder.name
    if not folder.is_dir():
        todo = "Set data.train_folder or data.valid_folder, or the folder to convert, to an existing one"
        raise DataError(Problem(str(folder), "no such folder", todo))
    suffixes = {form.suffix: form for form in formats}
    found: list[DataFile] = []
    lonely: list[Problem] = []
    left_out: dict[str, list[str]] = {}
    sides: set[str] = set()
    listed = None if remote is None else remote.list()
    if listed is None:
        entries = _walk(folder, tuple(suffixes), only, left_out)
    else:
        entries = _listed(folder, tuple(suffixes), listed, left_out)
    for path, name, stamp in entries:
        form = suffixes[f".{name.rpartition('.')[2]}"]
        side = form.side(path)
        side_stamp = None
        if side is not None:
            side_stamp = _stamp_of(side) if listed is None else listed.get(side.relative_to(folder).as_posix())
        if side is not None and side_stamp is None:
            lonely.append(Problem(str(side), f"is missing beside {path.name}", form.remake))
        if side is not None:
            sides.add(f"{name.removesuffix(path.name)}{side.name}")
        found.append(DataFile(path, name, stamp, form, side_stamp, remote))
    if not found and not lonely:
        kinds = " or ".join(suffixes)
        raise DataError(Problem(str(folder), f"contains no {kinds} file", "Create one with `internlm tokenize`"))
    if lonely:
        raise DataError(*sorted(lonely, key=lambda problem: problem.where))
    # The order of the samples: without suffixes, so that it stays the same when a file is converted.
    found.sort(key=lambda file: file.stem)
    for before, file in itertools.pairwise(found):
        if before.stem == file.stem:
            message = f"{before.path.name} and {file.path.name} are beside each other, and would be read twice"
            raise DataError(Problem(str(file.path.parent), message, "Remove the one that was converted"))
    _log_left_out(folder, left_out, sides)
    return found


def _log_left_out(folder: Path, left_out: Mapping[str, list[str]], sides: Collection[str]) -> None:
    """Log, once for all ranks, what a search has left out, apart from the files that list samples."""
    parts = []
    for reason, names in left_out.items():
        if names := sorted(name for name in names if name not in sides):
            shown = ", ".join(map(repr, names[:MOST_NAMED]))
            parts.append(f"{len(names)} {reason} ({shown}{', ...' if len(names) > MOST_NAMED else ''})")
    if parts and first_of_all_ranks(f"left out of {folder}"):
        get_logger().warning(f"{folder}: left out: {'; '.join(parts)}")


def _walk(
    folder: Path, suffixes: tuple[str, ...], only: str | None, left_out: dict[str, list[str]]
) -> Iterator[tuple[Path, str, Stamp]]:
    """Yield all files with these suffixes; follow symbolic links except those to a parent folder.

    With ``only``, yield just the files of this name, without suffix, directly in the folder. Otherwise add the relative
    names of the rest to ``left_out``, by the reason; hidden files are expected.
    """
    root = str(folder)

    def leave(reason: str, path: str) -> None:
        left_out.setdefault(reason, []).append(path[len(root) :].strip("/"))

    def cannot_list(error: OSError) -> None:
        leave("that cannot be listed", str(error.filename))

    for here, folders, names in os.walk(root, onerror=cannot_list, followlinks=True):
        real = Path(here).resolve()
        if only is not None:
            folders.clear()
            names = [name for name in names if name.rpartition(".")[0] == only]
        for name in folders.copy():
            if real.is_relative_to((real / name).resolve()):
                folders.remove(name)
                leave("linked to a folder around it", f"{here}/{name}")
        inner = here[len(root) :].strip("/")
        for name in names:
            if not name.endswith(suffixes):
                if only is None and not name.startswith("."):
                    leave(OTHER_SUFFIX, f"{here}/{name}")
                continue
            relative = f"{inner}/{name}" if inner else name
            # A name is printed in errors and logs, where a line end or an escape sequence would forge lines.
            if not relative.isprintable():
                _refuse_name(folder, relative)
            path = Path(here, name)
            if (stamp := _stamp_of(path)) is None:
                leave("that is no regular file", f"{here}/{name}")
            else:
                yield path, relative, stamp


def _listed(
    folder: Path, suffixes: tuple[str, ...], listed: dict[str, Stamp], left_out: dict[str, list[str]]
) -> Iterator[tuple[Path, str, Stamp]]:
    """Yield the files of a remote that have these suffixes; add the names of the others to ``left_out``."""
    for name, stamp in listed.items():
        if name.endswith(suffixes):
            # A key of an object store may be any text, which must not lead out of the folder of the copies.
            if not name.isprintable() or not {"", ".", ".."}.isdisjoint(name.split("/")):
                _refuse_name(folder, name)
            yield folder / name, name, stamp
        elif not name.rpartition("/")[2].startswith("."):
            left_out.setdefault(OTHER_SUFFIX, []).append(name)


def _refuse_name(folder: Path, name: str) -> None:
    kind, _, rest = name.partition("/")
    if rest and not kind.isprintable():
        message = f"the folder {kind!r}, which names a dataset type, has control characters in its name"
    else:
        what = "an empty part, '.' or '..'" if name.isprintable() else "control characters"
        message = f"the path {name!r} has {what} in its name"
    raise DataError(Problem(repr(str(folder))[1:-1], message, "Rename it"))


def _stamp_of(path: Path) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing, or removed since it was listed
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else None
