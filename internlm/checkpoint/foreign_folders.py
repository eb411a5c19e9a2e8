"""Recognition of folders with checkpoints of other formats, by the names of their files.

A run must not mistake such a folder for an empty one and start from step 0, and an error about a path should name what
the path holds. Only names are read, so this works on local folders and on object stores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from internlm.utils.errors import Problem

#: Function from the path of a folder, relative to the one examined ("" for itself), to the names in it. Returns no
#: names for a folder that does not exist.
NamesIn: TypeAlias = Callable[[str], Collection[str]]

#: Number of a format's folders whose names are read, newest first: the newest may be the remains of a failed save.
_MOST_TRIED = 5


@dataclass(frozen=True, kw_only=True)
class ForeignFormat:
    """Checkpoint format of other software, and the names by which it is recognised."""

    software: str
    files: tuple[str, ...]
    """Regular expressions for names in the folder of one checkpoint. Each must match a name."""
    without: str = "$^"
    """Regular expression that no name may match."""
    steps: str = "$^"
    """Regular expression for the paths of such folders in a save folder; its group, if any, is the step."""
    parents: tuple[str, ...] = ("",)
    """Folders in the save folder whose sub-folders ``steps`` is matched with."""


HUGGING_FACE, INTERNEVO = "Hugging Face Transformers", "older versions of InternEvo"
META = "Llama's release"
#: Commands of ``internlm convert`` that make a checkpoint of a folder.
_COMMANDS = {HUGGING_FACE: "from-hf", META: "from-llama", INTERNEVO: "from-internevo"}
#: Values of ``ckpt.load_ckpt_info.ckpt_type`` by which a folder is loaded as it is.
CKPT_TYPES = {HUGGING_FACE: "hf", META: "llama"}
#: The rows are tried in this order.
FORMATS = (
    ForeignFormat(
        software=INTERNEVO,
        files=(
            # The scheduler's file is misspelt.
            r"(model|optimizer|topo)_(tp|wp|dp)\d+_.*\.(pt|json)|(context|schedulder|model_config|sampler_\d+)\.pt",
        ),
        steps=r"(\d+)|snapshot/\d+",
        parents=("", "snapshot"),
    ),
    ForeignFormat(
        software="DeepSpeed",
        files=(r".*_(model|optim)_states\.pt",),
        steps=r"global_step(\d+)",
    ),
    ForeignFormat(
        software="Megatron-LM",
        files=(r"(tp_)?mp_rank_\d+.*|common\.pt|latest_checkpointed_iteration\.txt",),
        steps=r"iter_(\d+)|release",
    ),
    ForeignFormat(
        software=HUGGING_FACE,
        files=(r"config\.json", r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?"),
        steps=r"checkpoint-(\d+)",
    ),
    ForeignFormat(software=META, files=(r"consolidated\.\d+\.pth", r"params\.json")),
    # With state.json it is a checkpoint of format 1.
    ForeignFormat(
        software="torch.distributed.checkpoint",
        files=(r"\.metadata", r".*\.distcp"),
        without=r"state\.json",
    ),
)


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Newest checkpoint of another format in a folder."""

    software: str
    path: str
    """Path of the checkpoint relative to the folder examined; "" if the folder itself is the checkpoint."""
    step: int | None
    """Step according to the name of its folder, or None."""

    def __str__(self) -> str:
        if not self.path:
            return f"a checkpoint in the format of {self.software}"
        step = "" if self.step is None else f", step {self.step}"
        return f"checkpoints in the format of {self.software} (the newest: {self.path}/{step})"


def find_foreign(names_in: NamesIn) -> ForeignCheckpoint | None:
    """Return the newest checkpoint of the first format in :data:`FORMATS` that is found, or None."""
    names = names_in("")
    for row in FORMATS:
        # Sub-folders first: Megatron-LM marks the folder that contains them, too.
        for step, path in _folders_of(row, names_in):
            if _matches(row, names_in(path)):
                return ForeignCheckpoint(row.software, path, step)
        if _matches(row, names):
            return ForeignCheckpoint(row.software, "", None)
    return None


def foreign_save_folder(root: str, names_in: NamesIn) -> Problem | None:
    """Return the problem of a save folder that only has checkpoints of another format, or None.

    Args:
        root: Save folder of a run that is to resume, for the error.
        names_in: Function that lists the save folder.
    """
    found = find_foreign(names_in)
    if found is None:
        return None
    message = f"holds no checkpoint of this version to resume from, but {found}"
    todo = "Choose another ckpt.save_ckpt_folder, or set ckpt.auto_resume=False to start a new run in this one"
    return Problem(root, message, todo)


def foreign_source(folder: str, names_in: NamesIn) -> Problem | None:
    """Return the problem of a folder that is to be loaded and holds checkpoints of another format, or None.

    Args:
        folder: Folder that the user named, for the error.
        names_in: Function that lists the folder.
    """
    found = find_foreign(names_in)
    if found is None:
        return None
    todo = "Choose a step-N folder that a run has saved"
    if found.software in CKPT_TYPES:
        todo += f", or set ckpt.load_ckpt_info.ckpt_type={CKPT_TYPES[found.software]!r}"
    if found.software in _COMMANDS:
        todo += f" (to make a checkpoint of it: internlm convert {_COMMANDS[found.software]})"
    return Problem(folder, f"not a checkpoint of this version: it holds {found}", todo)


def _folders_of(row: ForeignFormat, names_in: NamesIn) -> Iterator[tuple[int | None, str]]:
    """Yield step and path of the folders whose names are those of ``row``, newest first, at most a few."""
    paths = [f"{parent}/{name}".lstrip("/") for parent in row.parents for name in names_in(parent)]
    matches = [match for path in paths if (match := re.fullmatch(row.steps, path))]
    # Folders without a step, such as snapshots, come last.
    numbered = sorted(((int(match[1] or -1), match[0]) for match in matches), reverse=True)
    for step, path in numbered[:_MOST_TRIED]:
        yield None if step < 0 else step, path


def _matches(row: ForeignFormat, names: Collection[str]) -> bool:
    """Return whether ``names`` are those of a checkpoint of ``row``."""
    if any(re.fullmatch(row.without, name) for name in names):
        return False
    return all(any(re.fullmatch(pattern, name) for name in names) for pattern in row.files)
