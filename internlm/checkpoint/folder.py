"""The save folder: ``step-N`` folders, each complete once its commit mark is there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm.utils.errors import CheckpointError, Problem

FORMAT = 1
STATE_FILE = "state.json"
COMMIT_FILE = "COMMITTED"
_STEP = re.compile(r"step-(\d+)")


def local_path(location: str) -> Path:
    """``local:FOLDER`` or a plain path."""
    return Path(location.removeprefix("local:")).expanduser()


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step}"


def steps_in(root: Path) -> Iterator[tuple[int, Path]]:
    """Every checkpoint folder, complete or not, the newest first."""
    if root.is_dir():
        found = ((_STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
        yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was committed."""
    return (folder / COMMIT_FILE).is_file()


def write_durably(path: Path, text: str) -> None:
    """Write under another name, flush to the disk, rename: the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def to_text(content: dict[str, Any]) -> str:
    """JSON, laid out for people."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_state(folder: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The small, human-readable part of a checkpoint, with the keys that are ``needed``.

    Raises :class:`CheckpointError` where ``folder`` is not a complete one."""
    if not folder.is_dir():
        there = ", ".join(path.name for _, path in steps_in(folder.parent)) or "no checkpoint"
        raise CheckpointError(
            Problem(str(folder), f"no such checkpoint ({folder.parent} holds {there})", "Check the path")
        )
    if not (folder / STATE_FILE).is_file():
        unfinished = (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
        what = f"unfinished: {STATE_FILE} is missing" if unfinished else f"not a checkpoint: it has no {STATE_FILE}"
        raise CheckpointError(Problem(str(folder), what, "Choose a folder named step-N that was completed"))
    if not is_complete(folder):
        raise CheckpointError(Problem(str(folder), "unfinished: its commit mark is missing", "Choose an older one"))
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
        newer = state["format"] > FORMAT
        _ = newer or [state[key] for key in needed]
    except KeyError as error:
        what = f"has no {error}: another version wrote it, or it was changed"
        raise CheckpointError(Problem(str(folder / STATE_FILE), what, "Choose another one")) from None
    except (ValueError, TypeError) as error:  # no JSON, or no state
        raise CheckpointError(
            Problem(str(folder / STATE_FILE), f"can't be read ({error!r})", "Choose another one")
        ) from None
    if newer:
        raise CheckpointError(
            Problem(str(folder), f"has format {state['format']}, this version reads up to {FORMAT}", "Update InternEvo")
        )
    return state
