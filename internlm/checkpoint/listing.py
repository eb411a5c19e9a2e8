"""List of what a folder of checkpoints holds, from manifests alone: no tensor is read, and nothing is changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from internlm.checkpoint import format_1
from internlm.checkpoint.lease import LEASE_FILE, LeaseTimes, parse_owner
from internlm.checkpoint.run_state import LARGEST_STATE, RunState, parse_run_state
from internlm.checkpoint.saved_checkpoint import (
    Found,
    find_checkpoints,
    lost_its_manifest,
    names_of_checkpoint,
    read_outline,
    read_state,
)
from internlm.checkpoint.storage import COMPARED_BYTES, MANIFEST, Storage
from internlm.checkpoint.tensor_reader import TODO, UnreadableCheckpointError, unreadable
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One folder of a checkpoint, or of an unfinished save."""

    name: str
    step: int | None
    status: str
    """committed, snapshot, replaced (by an unfinished save of this step), unfinished, deleting, damaged, unreadable (it
    may be whole), or newer (of a format that this version cannot read)."""
    size: int
    """Bytes of its files; in format 2 of those that its manifest lists."""
    saved: float | None = None
    """Time of the commit, in seconds since the epoch; of the last write, if it is not committed or damaged."""
    format: int | None = None
    ranks: int | None = None
    """Number of ranks of the run that saved."""
    problem: str = ""


def list_checkpoints(storage: Storage) -> Iterator[Entry]:
    """Yield the checkpoints of a folder, the committed and the unfinished, newest first."""
    found = find_checkpoints(storage)
    unfinished = {entry.name for entry in found if not entry.is_committed}
    known = {entry.name for entry in found}
    for folder, checkpoint in storage.leftovers().items():
        # In an object store, the attempts of a checkpoint are folders in its own.
        if folder not in known and checkpoint not in unfinished.intersection({folder.partition("/")[0]}):
            step = checkpoint.removeprefix("step-")
            found.append(Found(folder, int(step) if step.isdecimal() else -1, False))
    for entry in sorted(found, key=lambda entry: -entry.step):
        yield describe(storage, entry)


def live_owner(storage: Storage) -> str:
    """Return which live run owns the folder, as far as its lease shows, or an empty string."""
    try:
        owner = parse_owner(storage.read(LEASE_FILE, COMPARED_BYTES))
        seconds = max(time.time() - storage.written(LEASE_FILE), 0)
    except OSError:
        return ""
    if owner is None or owner.is_dead() or seconds > LeaseTimes().to_live:
        return ""
    return f"{storage.location} is owned by a live run ({owner}, renewed {seconds:.0f} s ago)"


def describe(storage: Storage, found: Found) -> Entry:
    """Return what is known of a folder without reading tensors."""
    name, step = found.name, found.step if found.step >= 0 else None
    if not found.is_committed:
        status = "deleting" if ".deleting-" in name else "unfinished"
        return _unread(storage, name, step, status)
    status = "replaced" if ".replaced-" in name else "snapshot" if name.startswith("snapshot-") else "committed"
    try:
        state, size, mark = _read(storage, name)
    except DamagedCheckpointError as error:
        return _unread(storage, name, step, "damaged", str(error.problems[0]))
    except UnreadableCheckpointError as error:
        return _unread(storage, name, step, "unreadable", str(error.problems[0]))
    except CheckpointError as error:
        return _unread(storage, name, step, "newer", str(error.problems[0]))
    return Entry(
        name=name,
        step=state.train_state.step,
        status=status,
        size=size,
        saved=storage.written(f"{name}/{mark}"),
        format=state.format,
        ranks=state.world_size,
    )


def _unread(storage: Storage, name: str, step: int | None, status: str, problem: str = "") -> Entry:
    size, written = _usage(storage, name)
    return Entry(name=name, step=step, status=status, size=size, saved=written, problem=problem)


def _read(storage: Storage, name: str) -> tuple[RunState, int, str]:
    """Return the state of a checkpoint, its size, and the file that commits it."""
    names = names_of_checkpoint(storage, name)
    if lost_its_manifest(names):
        raise DamagedCheckpointError(Problem(storage.path(name), f"{MANIFEST} is missing", TODO))
    if MANIFEST in names:
        outline = read_outline(storage, name)
        size = sum(record.size for record in outline.files.values())
        return read_state(storage, name, outline), size, MANIFEST
    file = f"{name}/{format_1.STATE_FILE}"
    try:
        content = storage.read(file, LARGEST_STATE)
    except OSError as error:
        raise unreadable(error, storage.path(file)) from None
    return parse_run_state(content, storage.path(file), 1), _usage(storage, name)[0], format_1.COMMIT_FILE


def _usage(storage: Storage, folder: str) -> tuple[int, float | None]:
    """Return the size of all regular files in a folder, and the time of the last write to one of them."""
    total, times = 0, list[float]()
    try:
        names = storage.names(folder)
    except OSError:  # of another user
        names = []
    for name in names:
        path = f"{folder}/{name.rstrip('/')}"
        if name.endswith("/"):
            inner, written = _usage(storage, path)
            total += inner
            times += [] if written is None else [written]
            continue
        # A file that vanishes meanwhile is not counted, and neither is a link.
        with suppress(OSError):
            source = storage.open(path)
            total += source.size
            source.close()
            times.append(storage.written(path))
    return total, max(times, default=None)
