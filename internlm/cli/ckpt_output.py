"""Helpers of the commands of ``internlm ckpt``: errors of storages, and texts for a terminal."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from internlm.checkpoint.folder_checks import reason_of, todo_at
from internlm.checkpoint.foreign_folders import find_foreign
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.saved_checkpoint import OF_ONE_CHECKPOINT, Found, find_checkpoints, plain_names
from internlm.checkpoint.storage import Storage
from internlm.utils.errors import CheckpointError, Problem

#: Number of names that an error lists.
_MOST_NAMES = 8

F = TypeVar("F", bound=Callable[..., Any])


def reports_storage_errors(command: F) -> F:
    """Decorate a command to raise an error of a storage as a :class:`CheckpointError`."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # the reader of the output has closed it
            raise
        except OSError as error:
            where = str(error.filename or "internlm ckpt")
            todo = todo_at(where, error.errno, "Check the path and its permissions")
            raise CheckpointError(Problem(printable(where), reason_of(error), todo)) from None

    return wrapper  # type: ignore[return-value]


def open_folder(location: str) -> Storage:
    """Open a folder of checkpoints.

    Raises:
        CheckpointError: There is no such folder, or it is a checkpoint itself.
    """
    storage = open_storage(location)
    names = storage.names()
    if not names:
        _check_exists(location)
    if OF_ONE_CHECKPOINT & {*names}:
        todo = "Pass the folder around it, or use internlm ckpt show or verify"
        raise CheckpointError(Problem(storage.location, "is one checkpoint, not a folder of them", todo))
    return storage


def checkpoints_of_folder(location: str) -> list[Found]:
    """Return the checkpoints that a folder holds, newest first; none if ``location`` is a checkpoint itself."""
    storage = open_storage(location)
    return [] if OF_ONE_CHECKPOINT & {*storage.names()} else find_checkpoints(storage)


def _check_exists(location: str) -> None:
    """Raise if there is no folder at ``location``; name what the folder around it holds."""
    outer, name = split_checkpoint(location)
    storage = open_storage(outer)
    names = storage.names()
    if f"{name}/" in names:
        return
    existing = [printable(other) for other in names[:_MOST_NAMES]]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    message = f"no such folder ({storage.location} has {', '.join(existing) or 'nothing'}{more})"
    raise CheckpointError(Problem(storage.path(name), message, "Pass a folder of checkpoints"))


def foreign_note(storage: Storage) -> str:
    """Return a sentence about checkpoints of other software in a folder, empty if there are none."""
    found = find_foreign(partial(plain_names, storage))
    return f"{storage.location} holds {found}" if found else ""


# -- texts ------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line whose texts may come from a file that is not trusted."""
    print(printable(line))


def printable(text: str) -> str:
    """Return ``text`` with escapes for characters that are not printable: they could control a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(content: Any) -> None:
    """Print ``content`` as JSON."""
    print(json.dumps(_finite(content), indent=1, allow_nan=False))


def _finite(content: Any) -> Any:
    """Replace infinite numbers, which JSON does not have, by texts."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table with aligned columns; those at the indices ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_size(size: int) -> str:
    """Format bytes with three digits: ``1.23 GiB``."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{size} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB" if value < 1000 else f"{value:.0f} TiB"


def format_time(seconds: float | None) -> str:
    """Format a time in the local time zone; None is a dash."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def default_jobs() -> int:
    """Return the number of threads for reading: more than a few do not read faster."""
    return min(len(os.sched_getaffinity(0)), 8)
