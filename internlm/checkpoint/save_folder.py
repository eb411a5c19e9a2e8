"""Layout of the save folder: ``step-N`` folders, their ``state.json``, and the mark of a complete checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from internlm.checkpoint.foreign_folders import foreign_source, names_in_local
from internlm.checkpoint.run_state import LARGEST_STATE, RunState, parse_run_state
from internlm.utils.errors import CheckpointError, Problem

# Format version of the state file; increased when older versions of the framework can no longer read it.
FORMAT = 1
STATE_FILE = "state.json"
COMMIT_FILE = "COMMITTED"
_STEP = re.compile(r"step-(\d+)")


def local_path(location: str) -> Path:
    """Convert ``local:FOLDER`` or a plain path to a :class:`Path`."""
    return Path(location.removeprefix("local:")).expanduser()


def step_folder(root: Path, step: int) -> Path:
    """Return the checkpoint folder of ``step``."""
    return root / f"step-{step}"


def steps_in(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the step and the folder of every checkpoint, complete or not, newest first."""
    if root.is_dir():
        found = ((_STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
        # Sorted by step: as text, step-9 would come after step-100.
        yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def is_complete(folder: Path) -> bool:
    """Return whether the checkpoint in ``folder`` was committed."""
    return (folder / COMMIT_FILE).is_file()


def write_durably(path: Path, text: str) -> None:
    """Write a file atomically: after a crash it is complete or missing, never partial."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        # Without fsync the rename may reach the disk before the content, and a power failure leave an empty file.
        os.fsync(file.fileno())
    partial.replace(path)
    # A rename changes the folder, which needs an fsync of its own.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_state(folder: Path) -> RunState:
    """Read ``state.json`` of a complete checkpoint.

    Args:
        folder: Checkpoint folder ``step-N``.

    Raises:
        CheckpointError: ``folder`` is not a complete checkpoint, its format is newer than :data:`FORMAT`, or its state
            file is damaged.
    """
    name = _STEP.fullmatch(folder.name)
    if not folder.is_dir():
        existing = ", ".join(path.name for _, path in steps_in(folder.parent)) or "no checkpoint"
        message = f"no such checkpoint ({folder.parent} has {existing})"
        raise CheckpointError(Problem(str(folder), message, "Pass the path of an existing step-N folder"))
    if not (folder / STATE_FILE).is_file():
        # Rank 0 writes the state after all tensors, so tensor files without it are an interrupted save.
        unfinished = (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
        foreign = foreign_source(str(folder), names_in_local(folder))
        if foreign and not (unfinished and name):
            raise CheckpointError(foreign)
        message = f"unfinished: {STATE_FILE} is missing" if unfinished else f"not a checkpoint: it has no {STATE_FILE}"
        raise CheckpointError(Problem(str(folder), message, "Choose a complete step-N folder"))
    if not is_complete(folder):
        message = f"unfinished: the commit mark {COMMIT_FILE} is missing"
        raise CheckpointError(Problem(str(folder), message, "Choose an older checkpoint"))
    file = folder / STATE_FILE
    with file.open("rb") as opened:
        text = opened.read(LARGEST_STATE + 1)
    return parse_run_state(text, str(file), FORMAT, int(name[1]) if name else None)
