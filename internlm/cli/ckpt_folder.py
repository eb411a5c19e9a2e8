"""Commands on a folder of checkpoints: ``internlm ckpt ls`` and ``prune``."""

from __future__ import annotations

import argparse
import dataclasses
import re
import secrets
import sys
from collections.abc import Sequence
from functools import partial

from internlm.checkpoint.folder_checks import problem_of
from internlm.checkpoint.lease import Lease
from internlm.checkpoint.listing import Entry, list_checkpoints, live_owner
from internlm.checkpoint.save_folder import not_kept
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.verification import verify
from internlm.cli.ckpt_output import (
    default_jobs,
    foreign_note,
    format_size,
    format_time,
    open_folder,
    print_json,
    reports_storage_errors,
    say,
    table,
)
from internlm.utils.errors import CheckpointError, Problem

_HEADING = ("checkpoint", "step", "size", "saved", "format", "ranks", "status")
#: Files of an unfinished save. A folder of this name that has others may not be a checkpoint at all.
_OF_A_SAVE = re.compile(r"state\.json|\.metadata|.*\.distcp|rank-\d+\.bin|manifest\.json|[0-9a-z]+/")


@reports_storage_errors
def list_folder(arguments: argparse.Namespace) -> None:
    """List the checkpoints of a folder.

    Raises:
        CheckpointError: There is no such folder, or it cannot be read.
    """
    storage = open_folder(arguments.folder)
    entries = list(list_checkpoints(storage))
    foreign, owner = foreign_note(storage), live_owner(storage)
    if arguments.json:
        content = {"folder": storage.location, "owner": owner or None, "foreign": foreign or None}
        print_json({**content, "checkpoints": [dataclasses.asdict(entry) for entry in entries]})
        return
    if entries:
        for line in table([_HEADING, *map(_row, entries)], right=(1, 2)):
            say(line)
    else:
        say(f"{storage.location} holds no checkpoints")
    for entry in entries:
        if entry.problem:
            say(entry.problem)
    for note in filter(None, (foreign, owner)):
        say(note)


def _row(entry: Entry) -> Sequence[str]:
    numbers = ["-" if value is None else str(value) for value in (entry.step, entry.format, entry.ranks)]
    return (
        entry.name, numbers[0], format_size(entry.size), format_time(entry.saved), numbers[1], numbers[2], entry.status
    )  # fmt: skip


# -- prune ------------------------------------------------------------------------------------------------------------


@reports_storage_errors
def prune(arguments: argparse.Namespace) -> None:
    """Delete old checkpoints of a folder.

    Raises:
        CheckpointError: The folder cannot be read, none of its checkpoints verifies, a live run owns the folder, or a
            checkpoint cannot be deleted.
    """
    storage = open_folder(arguments.folder)
    entries = list(list_checkpoints(storage))
    old, notes = _old(storage, entries, arguments.keep_last, arguments.keep_every)
    left = _left_by_saves(storage, entries) if arguments.unfinished else []
    doomed = [*old, *left]
    if arguments.json:
        is_deleted = arguments.yes and bool(doomed)
        if is_deleted:
            _delete(storage, old, left)
        content = {"folder": storage.location, "deleted": is_deleted, "notes": notes}
        print_json({**content, "checkpoints": [dataclasses.asdict(entry) for entry in doomed]})
        return
    for note in notes:
        say(note)
    if not doomed:
        say("nothing to delete")
        return
    for line in table([_HEADING, *map(_row, doomed)], right=(1, 2)):
        say(line)
    total = f"{len(doomed)} folder{'s' * (len(doomed) > 1)}, {format_size(sum(entry.size for entry in doomed))}"
    if not (arguments.yes or _is_confirmed(f"Delete {total}? [y/N] ")):
        say(f"nothing was deleted; --yes deletes {total}")
        return
    _delete(storage, old, left)
    say(f"deleted {total}")


def _delete(storage: Storage, old: Sequence[Entry], left: Sequence[Entry]) -> None:
    """Delete old checkpoints, and what unfinished saves left, while holding the lease of the folder.

    Raises:
        CheckpointError: A live run owns the folder, or some of them cannot be deleted. The others are.
    """
    # A run that is saving must neither lose what it writes nor delete the same checkpoints.
    lease = Lease.acquire(storage, "internlm ckpt prune")
    try:
        # The run that was saving may have committed an attempt before it released the lease.
        present = {entry.name for entry in _left_by_saves(storage, list(list_checkpoints(storage)))} if left else set()
        deletions = [partial(storage.withdraw, entry.name, secrets.token_hex(4)) for entry in old]
        deletions += [partial(storage.remove, entry.name) for entry in left if entry.name in present]
        problems = []
        for delete in deletions:
            try:
                delete()
            except OSError as error:
                problems.append(problem_of(error, storage, "Make it writable, or delete it"))
        if left:
            storage.sweep()
    finally:
        lease.release()
    if problems:
        raise CheckpointError(*problems)


def _old(
    storage: Storage, entries: Sequence[Entry], keep_last: int, keep_every: int | None
) -> tuple[list[Entry], list[str]]:
    """Return the checkpoints to delete, newest first, without the newest one that verifies; and what was verified.

    Raises:
        CheckpointError: None verifies.
    """
    # A damaged checkpoint does not count: it must not push out a good one.
    checkpoints = {entry.step or 0: entry for entry in entries if entry.status == "committed"}
    doomed = not_kept(checkpoints, keep_last, keep_every)
    if not doomed:
        return [], []
    damages: list[Problem] = []
    for good in checkpoints.values():
        try:
            problems = verify(storage, good.name, default_jobs()).problems
        except CheckpointError as error:
            problems = list(error.problems)
        if not problems:
            notes = [*map(str, damages), f"{good.name} verifies and is kept"]
            return [entry for step, entry in checkpoints.items() if step in doomed and entry is not good], notes
        damages.append(problems[0])
    message = "none of its checkpoints verifies, so nothing is deleted"
    raise CheckpointError(*damages, Problem(storage.location, message, "See: internlm ckpt verify"))


def _left_by_saves(storage: Storage, entries: Sequence[Entry]) -> list[Entry]:
    """Return what unfinished saves and deletions left; a replaced checkpoint only if the one of its name is there."""
    committed = {entry.name for entry in entries if entry.status == "committed"}
    leftovers, settled = storage.leftovers(), storage.leftovers(settled=True)
    found = []
    for entry in entries:
        if entry.name in settled:
            is_left = entry.status != "replaced" or settled[entry.name] in committed
        elif entry.name in leftovers:
            is_left = False  # may still be committed by a late request
        else:
            is_left = entry.status == "unfinished" and _is_of_a_save(storage.names(entry.name))
        if is_left:
            found.append(entry)
    return found


def _is_of_a_save(names: Sequence[str]) -> bool:
    return all(map(_OF_A_SAVE.fullmatch, names))


def _is_confirmed(question: str) -> bool:
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
