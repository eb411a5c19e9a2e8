"""The save folder: ``step-N`` folders, each complete once its commit mark is there.

Writing ``torch.distributed.checkpoint`` files, and reading them without trusting them.

Its metadata is a pickle, and a pickle may run anything. The reader here builds only the handful of plain classes
that metadata is made of.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from internlm.utils.errors import CheckpointError, Problem
from internlm.utils.torch_private import CHECKPOINT_METADATA_NAMES

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


_ALLOWED = {
    *CHECKPOINT_METADATA_NAMES,
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class PlainWriter(dcp.FileSystemWriter):
    """A writer whose metadata holds nothing of the machine that wrote it."""

    def storage_meta(self) -> StorageMeta:
        """Without the folder's path, which would be a class for the reader to build."""
        return StorageMeta(save_id=self.save_id)


class SafeReader(dcp.FileSystemReader):
    """A reader that executes nothing it finds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; raises :class:`CheckpointError` where it is damaged or hostile."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _checked(_MetadataUnpickler(file).load())
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(Problem(str(path), f"can't be read ({error})", "Load another checkpoint")) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _checked(metadata: Any) -> Metadata:
    """``metadata``, if it is that, and speaks of files in its own folder alone."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds something else than metadata")
    for info in (metadata.storage_data or {}).values():
        if info.relative_path != Path(info.relative_path).name:
            raise ValueError(f"it names the file {info.relative_path!r}, outside the checkpoint")
    return metadata
