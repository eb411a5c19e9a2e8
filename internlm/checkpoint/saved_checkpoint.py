"""Saved checkpoints: those that a storage holds, and the content of one of them, in any format that was released."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader

from internlm.checkpoint import format_1
from internlm.checkpoint.folder_checks import is_damage, reason_of, todo_at
from internlm.checkpoint.foreign_folders import foreign_source
from internlm.checkpoint.fused_tensors import as_stored, names_as_stored
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.checkpoint.manifest import (
    LARGEST_MANIFEST,
    Manifest,
    NewerFormatError,
    Outline,
    checksum,
    parse_manifest,
    parse_outline,
    step_of,
)
from internlm.checkpoint.planners import read_alone
from internlm.checkpoint.run_state import LARGEST_STATE, RunState, parse_run_state
from internlm.checkpoint.storage import MANIFEST, Storage
from internlm.checkpoint.tensor_reader import TODO, TensorReader, unreadable
from internlm.checkpoint.tensor_writer import STATE_FILE
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem

_AnyOutline = TypeVar("_AnyOutline", bound=Outline)
#: Files by which a folder is one checkpoint rather than a folder of them.
OF_ONE_CHECKPOINT = frozenset({MANIFEST, format_1.COMMIT_FILE, STATE_FILE, "rank-00000.bin"})
_UNFINISHED = "unfinished: the save was interrupted before it was committed"
_CHOOSE_FOLDER = "Choose a step-N folder that a run has saved"
#: Names of checkpoints; a replaced one has a suffix, until the new one of its name is committed.
_NAME = re.compile(r"(?P<name>step-(?P<step>\d{1,18})|snapshot-\d)(\.replaced-\w+)?")
# Errors of one folder; others, such as a server that cannot be reached, are those of the whole storage.
_OF_ONE_FOLDER = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """Committed checkpoint whose manifest has been verified; its tensors are verified when they are read."""

    where: str
    """Path or address, for messages."""
    format: int
    state: RunState
    metadata: Metadata
    reader: StorageReader
    manifest: Manifest | None = None
    """None in format 1."""

    def as_stored(self, tensors: LogicalTensors) -> LogicalTensors:
        """Return views of ``tensors`` of a run by the names under which the checkpoint has them."""
        return as_stored(tensors, self.metadata.state_dict_metadata)

    def names_as_stored(self, names: Iterable[str]) -> set[str]:
        """Return the names under which the checkpoint has tensors of a run."""
        return names_as_stored(names, self.metadata.state_dict_metadata)

    def read(self, tensors: LogicalTensors) -> None:
        """Read into the slices of ``tensors``.

        Raises:
            DamagedCheckpointError: A piece that is needed does not verify, or cannot be read. Other pieces may have
                been read already.
        """
        if self.format != 1:
            read_alone(tensors, self.metadata, self.reader)
            return
        try:
            read_alone(tensors, self.metadata, self.reader)
        except Exception as error:  # files of format 1 are archives with pickles, whose damage raises nearly anything
            raise DamagedCheckpointError(Problem(self.where, f"cannot be read ({error})", TODO)) from None


def not_followed(storage: Storage) -> list[str]:
    """Return the names of checkpoints that are symbolic links, or files."""
    return [name for name in storage.names() if _NAME.fullmatch(name)]


@dataclass(frozen=True)
class Found:
    """Folder in a storage that holds a checkpoint."""

    name: str
    step: int
    """-1 if the manifest of a snapshot does not show it."""
    is_committed: bool
    is_readable: bool = True
    """Whether the names in it, and the manifest of a snapshot, can be read."""


def find_checkpoints(storage: Storage) -> list[Found]:
    """Return the checkpoints in ``storage``, the committed and the unfinished, newest first.

    One whose folder cannot be read counts as committed, and a snapshot that cannot be read as the newest: a run must
    not fall back to an older one without a word.
    """
    found = []
    for folder in storage.names():
        match = _NAME.fullmatch(folder.removesuffix("/"))
        if not match or not folder.endswith("/"):
            continue
        step = int(match["step"]) if match["step"] else -1
        try:
            names = storage.names(match[0])
            if not match["step"]:
                step = _step_of_snapshot(storage, match[0])
        except OSError as error:
            if error.errno not in _OF_ONE_FOLDER:
                raise
            found.append(Found(match[0], step, is_committed=True, is_readable=False))
            continue
        # A folder of format 2 has its final name only when it is committed, so a missing manifest is damage.
        is_committed = bool({MANIFEST, format_1.COMMIT_FILE} & {*names}) or lost_its_manifest(names)
        is_committed = is_committed and not _is_late(storage, match[0], names)
        found.append(Found(match[0], step, is_committed))
    # At the same step, the newest save comes first, and a checkpoint before a snapshot.
    return sorted(found, key=_newness, reverse=True)


def _newness(entry: Found) -> tuple[float, bool, str]:
    step = math.inf if entry.step < 0 and not entry.is_readable else entry.step
    return step, "replaced" not in entry.name, entry.name


def plain_names(storage: Storage, folder: str = "") -> list[str]:
    """Return the names in ``folder``, those of folders without their slash."""
    return [name.rstrip("/") for name in storage.names(folder.rstrip("/"))]


def _step_of_snapshot(storage: Storage, name: str) -> int:
    try:
        source = storage.open(f"{name}/{MANIFEST}")
    except OSError as error:
        if is_damage(error):
            return -1
        raise
    try:
        beginning = bytearray(256)
        source.read_into(0, memoryview(beginning))
    except OSError as error:
        if is_damage(error):
            return -1
        raise
    finally:
        source.close()
    step = step_of(bytes(beginning))
    return -1 if step is None else step


def lost_its_manifest(names: Collection[str]) -> bool:
    """Return whether a folder with these names is a committed checkpoint whose manifest was removed."""
    return MANIFEST not in names and any(re.fullmatch(r"rank-\d+\.bin", name) for name in names)


def _is_late(storage: Storage, name: str, names: Collection[str]) -> bool:
    """Return whether a manifest is all there is: in an object store, one that arrived after its save was given up."""
    return [*names] == [MANIFEST] and storage.attempt_folder(name, "").startswith(f"{name}/")


def open_checkpoint(storage: Storage, name: str) -> SavedCheckpoint:
    """Verify the manifest of a checkpoint, and return its content.

    Args:
        storage: Storage of the checkpoint.
        name: Folder in it, usually ``step-N``.

    Raises:
        DamagedCheckpointError: The checkpoint was committed, but does not verify.
        CheckpointError: There is no committed checkpoint of this name, or a newer version wrote it, or its folder
            cannot be read.
    """
    try:
        return _open(storage, name)
    except OSError as error:
        where = str(error.filename or storage.path(name))
        todo = todo_at(where, error.errno, _CHOOSE_FOLDER)
        raise CheckpointError(Problem(where, reason_of(error), todo)) from None


def names_of_checkpoint(storage: Storage, name: str) -> list[str]:
    """Return the names in the folder of a checkpoint.

    Raises:
        DamagedCheckpointError: The folder is damaged.
        UnreadableCheckpointError: The folder is out of reach.
    """
    try:
        return storage.names(name)
    except OSError as error:
        if error.errno not in _OF_ONE_FOLDER:
            raise
        raise unreadable(error, storage.path(name)) from None


def _open(storage: Storage, name: str) -> SavedCheckpoint:
    where, names = storage.path(name), names_of_checkpoint(storage, name)
    if MANIFEST in names:
        return _open_format_2(storage, name, where)
    if not _NAME.fullmatch(name) and name in storage.leftovers():
        message = "unfinished: its deletion was interrupted" if ".deleting-" in name else _UNFINISHED
        raise CheckpointError(Problem(where, message, TODO))
    if lost_its_manifest(names):
        raise DamagedCheckpointError(Problem(where, f"{MANIFEST} is missing", TODO))
    if format_1.COMMIT_FILE in names and isinstance(storage, LocalStorage):
        return _open_format_1(Path(where))
    raise CheckpointError(_not_a_checkpoint(storage, name, names))


def _not_a_checkpoint(storage: Storage, name: str, names: Collection[str]) -> Problem:
    where = storage.path(name)
    if not names and f"{name}/" not in storage.names():
        existing = ", ".join(entry.name for entry in find_checkpoints(storage)) or "no checkpoint"
        message = f"no such checkpoint ({storage.location} has {existing})"
        return Problem(where, message, "Pass the path of an existing step-N folder")
    unfinished = any(re.fullmatch(r"\.metadata|.*\.distcp|[0-9a-f]+/", file) for file in names)
    foreign = foreign_source(
        where, lambda path: [file.rstrip("/") for file in storage.names(f"{name}/{path}".rstrip("/"))]
    )
    if foreign and not (unfinished and _NAME.fullmatch(name)):
        return foreign
    if unfinished:
        return Problem(where, _UNFINISHED, TODO)
    inner = [match for file in names if (match := _NAME.fullmatch(file.rstrip("/")))]
    if inner:
        inner.sort(key=lambda match: int(match["step"] or -1), reverse=True)
        message = f"is a folder of checkpoints, with {', '.join(match[0] for match in inner[:3])}"
        return Problem(where, message, f"Pass one of them, such as {where}/{inner[0][0]}")
    return Problem(where, f"not a checkpoint: it has no {MANIFEST}", _CHOOSE_FOLDER)


def _open_format_2(storage: Storage, name: str, where: str) -> SavedCheckpoint:
    manifest = read_manifest(storage, name)
    reader = TensorReader(storage, name, manifest)
    state = read_state(storage, name, manifest)
    return SavedCheckpoint(
        where=where,
        format=manifest.format,
        state=state,
        metadata=reader.read_metadata(),
        reader=reader,
        manifest=manifest,
    )


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read and verify the manifest of a checkpoint of format 2.

    Raises:
        DamagedCheckpointError: It does not verify.
        CheckpointError: A newer version of the framework wrote it.
    """
    return _read_manifest(storage, name, parse_manifest)


def read_outline(storage: Storage, name: str) -> Outline:
    """Read and verify the manifest of a checkpoint of format 2, and parse it without its tensors.

    Raises:
        DamagedCheckpointError: It does not verify.
        CheckpointError: A newer version of the framework wrote it.
    """
    return _read_manifest(storage, name, parse_outline)


def _read_manifest(storage: Storage, name: str, parse: Callable[[bytes, str | None], _AnyOutline]) -> _AnyOutline:
    where, match = storage.path(name), _NAME.fullmatch(name)
    try:
        content = storage.read(f"{name}/{MANIFEST}", LARGEST_MANIFEST)
        # Of a copy under another name, the manifest's own name is the expected one.
        return parse(content, match["name"] if match else None)
    except NewerFormatError as error:
        raise CheckpointError(Problem(where, str(error), "Update InternEvo")) from None
    except ValueError as error:
        raise DamagedCheckpointError(Problem(f"{where}/{MANIFEST}", str(error), TODO)) from None
    except OSError as error:
        raise unreadable(error, f"{where}/{MANIFEST}") from None


def read_state(storage: Storage, name: str, manifest: Outline) -> RunState:
    """Read and verify the state file of a checkpoint of format 2.

    Raises:
        DamagedCheckpointError: It does not verify, or has a wrong value.
        CheckpointError: A newer version of the framework wrote it.
    """
    file = next((file for file in manifest.files if file.rpartition("/")[2] == STATE_FILE), STATE_FILE)
    path, record = f"{name}/{file}", manifest.files.get(file)
    try:
        if record is None:
            raise ValueError("is not listed in the manifest")
        state = storage.read(path, LARGEST_STATE)
        if len(state) != record.size:
            raise ValueError(f"{len(state)} bytes, manifest says {record.size}")
        if checksum(state) != record.checksum:
            raise ValueError("differs from the file that was saved")
    except ValueError as error:
        raise DamagedCheckpointError(Problem(storage.path(path), str(error), TODO)) from None
    except OSError as error:
        raise unreadable(error, storage.path(path)) from None
    return parse_run_state(state, storage.path(path), manifest.format, manifest.step)


def _open_format_1(folder: Path) -> SavedCheckpoint:
    reader = format_1.SafeReader(folder)
    step = _NAME.fullmatch(folder.name)
    text = format_1.read_state(folder)
    state = parse_run_state(text, str(folder / STATE_FILE), 1, int(step["step"]) if step and step["step"] else None)
    metadata = reader.read_metadata()
    if problems := [*format_1.damaged_files(folder, metadata), *format_1.index_problems(str(folder), metadata)]:
        raise DamagedCheckpointError(*problems)
    return SavedCheckpoint(where=str(folder), format=1, state=state, metadata=metadata, reader=reader)
