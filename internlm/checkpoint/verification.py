"""Verification of a checkpoint on disk: all of its bytes are read, by several threads, and compared with checksums.

Files are read in *runs* of neighbouring pieces, so that threads share the work also where one rank wrote everything.
Reading and hashing release the interpreter's lock. Memory is that of one piece per thread.

Format 1 has no checksums of files. Its tensors are in ZIP archives, whose CRC-32 sums are compared instead; they cover
the values, but not every byte of a file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.storage import WriteResult

from internlm.checkpoint import format_1
from internlm.checkpoint.manifest import FileRecord, Manifest, Piece
from internlm.checkpoint.saved_checkpoint import names_of_checkpoint, open_checkpoint, read_manifest, read_state
from internlm.checkpoint.storage import MANIFEST, Storage
from internlm.checkpoint.tensor_reader import TODO, OpenFile
from internlm.checkpoint.tensor_writer import TensorWriter, memory_of
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem

#: Bytes of the pieces that a thread verifies at a time.
RUN_BYTES = 16 << 20
#: Function that is called with the number of bytes that were read since its last call, and the total.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Outcome of reading a whole checkpoint."""

    format: int
    files: int
    size: int
    """Bytes that the checkpoint has if nothing is missing, without the manifest."""
    problems: list[Problem]
    """What is damaged: for each file its first bad bytes."""
    unlisted: list[str]
    """Files in the folder that do not belong to the checkpoint."""


def verify(storage: Storage, name: str, jobs: int = 1, progress: Progress = lambda _read, _total: None) -> Verification:
    """Read and verify all files of a checkpoint.

    Args:
        storage: Storage of the checkpoint.
        name: Its folder.
        jobs: Number of threads.
        progress: Called in this thread from time to time.

    Raises:
        DamagedCheckpointError: The manifest does not verify, so that nothing else can be verified. In format 1: the
            state file or the index does not, or a file is too short.
        CheckpointError: There is no committed checkpoint of this name, or a newer version wrote it.
    """
    if MANIFEST not in names_of_checkpoint(storage, name):
        return _verify_format_1(storage, name, jobs, progress)
    manifest = read_manifest(storage, name)
    problems = damaged_files(storage, name, manifest_files(manifest), jobs=jobs, progress=progress)
    try:
        read_state(storage, name, manifest)
    except CheckpointError as error:
        known = {problem.where for problem in problems}
        problems = [*(problem for problem in error.problems if problem.where not in known), *problems]
    return Verification(
        format=manifest.format,
        files=len(manifest.files) + 1,
        size=sum(record.size for record in manifest.files.values()),
        problems=problems,
        unlisted=list(_unlisted(storage, name, {MANIFEST, *manifest.files})),
    )


# -- format 2 ---------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """Piece in a file; a file with one checksum counts as one piece of no tensor."""

    piece: Piece
    size: int
    tensor: str


class StoredFile(NamedTuple):
    """File of a checkpoint, or a run of neighbouring pieces in it."""

    name: str
    size: int
    """Size of the whole file."""
    pieces: Sequence[_Stored]

    @property
    def bytes_of_pieces(self) -> int:
        """Number of bytes of the pieces."""
        return sum(stored.size for stored in self.pieces)


class _Bad(NamedTuple):
    """Problem of a file: -1 as position if it cannot be read at all."""

    file: str
    position: int
    tensor: str
    problem: Problem


def manifest_files(manifest: Manifest) -> Iterator[StoredFile]:
    """Yield the files that a manifest lists."""
    by_file: dict[str, list[_Stored]] = {name: [] for name in manifest.files}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            by_file[piece.file].append(_Stored(piece, tensor.piece_bytes(piece), name))
    for file, record in manifest.files.items():
        by_position = sorted(by_file[file], key=lambda stored: stored.piece.position)
        yield _whole(file, record) if record.checksum else StoredFile(file, record.size, by_position)


def written_files(writer: TensorWriter, results: Sequence[WriteResult]) -> Iterator[StoredFile]:
    """Yield the files that a rank has written, from its results alone: the manifest of all ranks may be large."""
    pieces = [_Stored(result.storage_data, result.size_in_bytes, result.index.fqn) for result in results]
    if pieces:
        yield StoredFile(writer.prefix + writer.file, sum(stored.size for stored in pieces), pieces)
    for name, record in writer.whole_files.items():
        yield _whole(name, record)


def _whole(name: str, record: FileRecord) -> StoredFile:
    assert record.checksum is not None, name
    return StoredFile(name, record.size, [_Stored(Piece(name, 0, (), (), record.checksum), record.size, "")])


def damaged_files(
    storage: Storage,
    name: str,
    files: Iterable[StoredFile],
    *,
    jobs: int = 1,
    progress: Progress = lambda _read, _total: None,
) -> list[Problem]:
    """Read files of a checkpoint, and return a problem for each that does not verify.

    Args:
        storage: Storage of the checkpoint.
        name: Its folder.
        files: What the files should hold.
        jobs: Number of threads.
        progress: Called in this thread from time to time.
    """
    runs = [run for file in files for run in _runs(file)]
    verifier = _Verifier(storage, name)
    bad: dict[str, list[_Bad]] = {}
    total = sum(run.bytes_of_pieces for run in runs)
    for run, found in _in_threads(verifier.bad_pieces, runs, jobs):
        progress(run.bytes_of_pieces, total)
        bad.setdefault(run.name, []).extend(found)
    return [_first_of(found) for _, found in sorted(bad.items()) if found]


def _runs(file: StoredFile) -> Iterator[StoredFile]:
    """Yield runs that consist of all pieces of a file, and at least one."""
    run: list[_Stored] = []
    size = 0
    for stored in file.pieces:
        if run and size + stored.size > RUN_BYTES:
            yield file._replace(pieces=run)
            run, size = [], 0
        run.append(stored)
        size += stored.size
    yield file._replace(pieces=run)


class _Verifier:
    """Verifier of runs, with one buffer per thread."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self._of_thread = threading.local()

    def bad_pieces(self, run: StoredFile, stop: threading.Event) -> list[_Bad]:
        """Return the pieces of a run that do not verify."""
        bad = []
        try:
            with OpenFile(self.storage, f"{self.name}/{run.name}", run.size) as source:
                for stored in run.pieces:
                    if stop.is_set():
                        break
                    try:
                        source.read_verified(stored.piece, self._buffer(stored.size))
                    except DamagedCheckpointError as error:
                        bad.append(_Bad(run.name, stored.piece.position, stored.tensor, error.problems[0]))
        except DamagedCheckpointError as error:  # every run of this file finds the same
            return [_Bad(run.name, -1, "", error.problems[0])]
        return bad

    def _buffer(self, size: int) -> memoryview:
        buffer: memoryview | None = getattr(self._of_thread, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._of_thread.buffer = buffer = memory_of(torch.empty(size, dtype=torch.uint8))
        return buffer[:size]


def _first_of(found: Iterable[_Bad]) -> Problem:
    """Return the first problem of a file, with the tensor, and the number of further bad pieces."""
    first, *others = sorted(found, key=lambda bad: bad.position)
    if first.position < 0 or not first.tensor:
        return first.problem
    more = f" and {len(others)} more piece{'s' * (len(others) > 1)}" if others else ""
    return Problem(first.problem.where, f"{first.problem.message} ({first.tensor}{more})", first.problem.todo)


def _unlisted(storage: Storage, name: str, listed: Collection[str], inner: str = "") -> Iterator[str]:
    """Yield the files and folders below a checkpoint that are not listed; folders end with a slash."""
    folders = {file.rpartition("/")[0] + "/" for file in listed if "/" in file}
    for entry in storage.names(f"{name}/{inner}".rstrip("/")):
        path = inner + entry
        if path in folders:
            yield from _unlisted(storage, name, listed, path)
        elif path not in listed:
            yield path


# -- format 1 ---------------------------------------------------------------------------------------------------------


def _verify_format_1(storage: Storage, name: str, jobs: int, progress: Progress) -> Verification:
    checkpoint = open_checkpoint(storage, name)
    entries = sorted(checkpoint.metadata.storage_data.values(), key=lambda info: (info.relative_path, info.offset))
    total = sum(info.length for info in entries)
    first: dict[str, tuple[int, str]] = {}

    def check(info: Any, stop: threading.Event) -> str:
        return "" if stop.is_set() else format_1.archive_problem(storage, name, info)

    for info, message in _in_threads(check, entries, jobs):
        progress(info.length, total)
        if message:
            file = info.relative_path
            first[file] = min(first.get(file, (info.offset, message)), (info.offset, message))
    problems = [Problem(storage.path(f"{name}/{file}"), message, TODO) for file, (_, message) in sorted(first.items())]
    files = {info.relative_path for info in entries} | {*format_1.FILES}
    return Verification(
        format=1,
        files=len(files),
        size=sum(_size(storage, f"{name}/{file}") for file in files),
        problems=problems,
        unlisted=list(_unlisted(storage, name, files)),
    )


def _size(storage: Storage, name: str) -> int:
    source = storage.open(name)
    source.close()
    return source.size


# -- threads ----------------------------------------------------------------------------------------------------------


def _in_threads(
    function: Callable[[Any, threading.Event], Any], arguments: Sequence[Any], jobs: int
) -> Iterator[tuple[Any, Any]]:
    """Call ``function`` with each of ``arguments`` in threads, and yield (argument, result) as calls end.

    The event is set when the caller stops early, for instance by Ctrl-C, so that calls that are running end soon.
    """
    stop = threading.Event()
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="verify")
    try:
        calls: dict[Future[Any], Any] = {executor.submit(function, entry, stop): entry for entry in arguments}
        for call in as_completed(calls):
            yield calls[call], call.result()
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)
