"""The save folder: ``step-N`` folders with their human-readable state, each complete once its commit mark exists."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm.utils.errors import CheckpointError, Problem

# Of the state file; raised when an older version could no longer read it.
FORMAT = 1
STATE_FILE = "state.json"
COMMIT_FILE = "COMMITTED"
_STEP = re.compile(r"step-(\d+)")


def local_path(location: str) -> Path:
    """Return the path of ``local:FOLDER``, or of a plain path."""
    return Path(location.removeprefix("local:")).expanduser()


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return root / f"step-{step}"


def steps_in(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the step and the folder of every checkpoint, complete or not, newest first."""
    if root.is_dir():
        found = ((_STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
        # By number: as text, step-9 would come after step-100.
        yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def is_complete(folder: Path) -> bool:
    """Return whether the checkpoint was committed."""
    return (folder / COMMIT_FILE).is_file()


def write_durably(path: Path, text: str) -> None:
    """Write a file that is complete or missing after a crash, never partial."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        # Without this the rename may reach the disk before the content, and a power failure leaves an empty file.
        os.fsync(file.fileno())
    partial.replace(path)
    # A rename is a change of the folder, which is flushed separately.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def to_text(content: dict[str, Any]) -> str:
    """Format ``content`` as JSON for people: indented, keys sorted."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_state(folder: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Read ``state.json``, the small human-readable part of a checkpoint.

    Args:
        folder: a ``step-N`` folder.
        needed: keys that must be present.

    Raises:
        CheckpointError: ``folder`` is not a complete checkpoint, a newer version wrote it, or a key is missing.
    """
    if not folder.is_dir():
        existing = ", ".join(path.name for _, path in steps_in(folder.parent)) or "no checkpoint"
        what = f"no such checkpoint ({folder.parent} holds {existing})"
        raise CheckpointError(Problem(str(folder), what, "Check the path"))
    if not (folder / STATE_FILE).is_file():
        # Rank 0 writes the state after all tensors, so tensor files without it are a save that was interrupted.
        unfinished = (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
        what = f"unfinished: {STATE_FILE} is missing" if unfinished else f"not a checkpoint: it has no {STATE_FILE}"
        raise CheckpointError(Problem(str(folder), what, "Choose a folder named step-N that was completed"))
    if not is_complete(folder):
        raise CheckpointError(Problem(str(folder), "unfinished: its commit mark is missing", "Choose an older one"))
    file = folder / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        newer = state["format"] > FORMAT
        # The keys of a newer format are not ours to judge: report the format rather than a missing key.
        _ = newer or [state[key] for key in needed]
    except KeyError as error:
        what = f"has no {error}: another version wrote it, or it was changed"
        raise CheckpointError(Problem(str(file), what, "Choose another one")) from None
    except (ValueError, TypeError) as error:  # not JSON, or JSON of another shape
        raise CheckpointError(Problem(str(file), f"can't be read ({error!r})", "Choose another one")) from None
    if newer:
        what = f"has format {state['format']}, this version reads up to {FORMAT}"
        raise CheckpointError(Problem(str(folder), what, "Update InternEvo"))
    return state
