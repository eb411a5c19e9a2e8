"""A crash at every call that changes a file of the save folder: kill -9 (F3), also in the background and while old
checkpoints are deleted (F5), and a power failure, after which less is left.

A run on real ranks is recorded once, and replayed up to each call.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import xxhash

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.save_folder import SaveFolder
from internlm.checkpoint.saved_checkpoint import find_checkpoints
from internlm.checkpoint.storage import MANIFEST
from tests.dist.whole_runs import recorded_warnings
from tests.faults.disk import (
    Call,
    Disk,
    Journal,
    Tree,
    calls_in,
    killed,
    names_without_data,
    only_flushed,
    some,
    torn,
    watched,
    write_tree,
)
from tests.faults.recorded_runs import Recording, Resumed, Saved, Scenario, record, resume_each
from tests.unit.checkpoint.samples import damage

IN_BACKGROUND = "ckpt.async_upload=True"
#: Fault and scenario.
ROWS = {
    "in the foreground": ("F3", Scenario()),
    "over existing steps": ("F3", Scenario(again=1)),
    "in the background": ("F5", Scenario(overrides=(IN_BACKGROUND,))),
}
MORE_ROWS = {
    "four ranks": ("F3", Scenario(ranks=4, overrides=("parallel.zero1.size=2",))),
    "two stages": ("F5", Scenario(overrides=(IN_BACKGROUND, "parallel.pipeline.size=2", "model.num_layers=2"))),
    "bfloat16": ("F5", Scenario(overrides=(IN_BACKGROUND, "model.dtype=torch.bfloat16"), again=3)),
}
ALL_ROWS = {**ROWS, **MORE_ROWS}
PARAMETERS = [
    pytest.param(name, id=name, marks=[pytest.mark.fault(fault), *([pytest.mark.wide] if name in MORE_ROWS else [])])
    for name, (fault, _) in ALL_ROWS.items()
]
Keep = Callable[[int, Call], bool]
KEEPS: list[Keep] = [killed, only_flushed]
#: Numbers of random choices of what a power failure leaves, and between how many writes there is one that is tried.
FEW, MANY = 1, 10
SPARSE = 20


@functools.cache
def recorded(name: str) -> tuple[Recording, Path]:
    """Record a scenario once for all tests; the folder is removed with the process."""
    folder = tempfile.TemporaryDirectory(prefix="crashes-")
    _folders.append(folder)
    return record(ALL_ROWS[name][1], Path(folder.name)), Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def crashes(recording: Recording, keeps: Sequence[Keep]) -> Iterator[tuple[int, Tree]]:
    """Yield each different content of the folder after a crash, with the number of calls that were made."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for count in range(1, len(recording.calls) + 1):
        trees = [recording.disk.after(count, keep) for keep in keeps]
        if half := torn(recording.disk, count):
            trees.append(half)
        allowed = tuple(f"{save.begun}" for save in recording.allowed(count))
        for tree in trees:
            key = _digest(tree), allowed
            if key not in seen:
                seen.add(key)
                yield count, tree


def _digest(tree: Tree) -> str:
    hasher = xxhash.xxh3_128()
    for name, content in tree.items():
        assert content is None or isinstance(content, bytes)
        hasher.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
        hasher.update(content or b"")
    return hasher.hexdigest()


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_crash_leaves_the_last_checkpoint_or_the_new_one(
    name: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    recording, _ = recorded(name)
    storage, crash_count = LocalStorage(tmp_path / "ckpts"), 0
    choices = MANY if request.config.getoption("--wide") else FEW
    for count, tree in crashes(recording, [*KEEPS, names_without_data, *map(some, range(choices))]):
        crash_count += 1
        shutil.rmtree(storage.root, ignore_errors=True)
        storage.root.mkdir()
        write_tree(tree, storage.root)
        problem = _problem(storage, recording, count)
        assert not problem, f"after {count} calls, of which the last is {recording.calls[count - 1]}: {problem}"
    record_property("faults", crash_count)
    assert crash_count > len(recording.calls)


@pytest.mark.fault("F3")
def test_a_crash_while_a_run_removes_what_another_crash_left_loses_nothing(
    record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    recording, _ = recorded("over existing steps")
    by_leftovers = {}
    for count, tree in crashes(recording, [killed]):
        if left := tuple(name for name in tree if re.fullmatch(r"\w+-\d+\.[^/]+", name)):
            by_leftovers[left] = count, tree
    assert any(".replaced-" in name for left in by_leftovers for name in left)
    crash_count = 0
    for count, tree in by_leftovers.values():
        disk, start = _cleanup(tree, tmp_path / "first")
        for calls, keep in itertools.product(range(start, len(disk.calls) + 1), KEEPS):
            storage = LocalStorage(tmp_path / "second")
            shutil.rmtree(storage.root, ignore_errors=True)
            storage.root.mkdir()
            write_tree(disk.after(calls, keep), storage.root)
            crash_count += 1
            problem = _problem(storage, recording, count)
            assert not problem, f"after {count} calls and {disk.calls[start:calls]}: {problem}"
    record_property("faults", crash_count)


def _cleanup(tree: Tree, root: Path) -> tuple[Disk, int]:
    """Record how a run tidies a folder; return the calls, and how many of them wrote what was there before."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    file = root.with_name("journal")
    file.unlink(missing_ok=True)
    journal = Journal(file)
    with watched(root, journal), recorded_warnings():
        for name, content in tree.items():
            if isinstance(content, bytes):
                with LocalStorage(root).create(name) as sink:
                    sink.write(memoryview(content))
            else:
                os.mkdir(root / name)
        for folder in (root, *(root / name for name, content in tree.items() if content is None)):
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        start = len(calls_in(file))
        SaveFolder(LocalStorage(root)).tidy()
    journal.close()
    return Disk(calls_in(file)), start


def _problem(storage: LocalStorage, recording: Recording, count: int) -> str:
    """Return what is wrong with the folder after a crash, or an empty string."""
    committed = [entry.name for entry in find_checkpoints(storage) if entry.is_committed]
    if not committed:
        return "no checkpoint is left" if recording.must_hold_one(count) else ""
    newest = storage.read(f"{committed[0]}/{MANIFEST}", 1 << 20)
    if newest not in (save.manifest for save in recording.allowed(count)):
        return f"{committed[0]} is neither the last nor the new one"
    # What is being deleted is damaged after the first file, but no run would load it.
    for name in {committed[0], *committed} - (storage.leftovers().keys() - {committed[0]}):
        for problem in damage(storage, name):
            return str(problem)
    return ""


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_run_resumes_after_every_crash(
    name: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """With the bits that were saved, one line about each unfinished checkpoint, and nothing left of them."""
    recording, folder = recorded(name)
    is_wide = request.config.getoption("--wide")
    chosen = [
        (count, tree)
        for count, tree in crashes(recording, [*KEEPS, some(0)] if is_wide else KEEPS)
        if is_wide or recording.calls[count - 1].kind != "write" or count % SPARSE == 0
    ]
    record_property("faults", len(chosen))
    results = resume_each(ALL_ROWS[name][1], folder, [tree for _, tree in chosen], timeout=280)
    for (count, tree), ranks in zip(chosen, results, strict=True):
        problem = _wrong_resume(recording, count, tree, ranks)
        assert not problem, f"after {count} calls, of which the last is {recording.calls[count - 1]}: {problem}"


def _wrong_resume(recording: Recording, count: int, tree: Tree, ranks: tuple[Resumed, ...]) -> str:
    """Return what is wrong with a run that resumed after a crash, or an empty string."""
    first = ranks[0]
    unfinished = {name.partition(".")[0] for name, content in tree.items() if content is None and "." in name}
    if any(rank.message != first.message for rank in ranks) or any(rank.warnings for rank in ranks[1:]):
        return f"ranks differ: {ranks}"
    for warning in first.warnings:
        if warning.startswith("already at step 4") or ": took over the lease of " in warning:
            continue
        match = re.fullmatch(r"ignored unfinished checkpoint (\S+) in .*", warning) or re.fullmatch(
            r"restored .*/(\S+): the save that was to replace it is unfinished", warning
        )
        if not match or match[1] not in unfinished:
            return warning
    if left := [name for name in first.names if re.match(r"\w+-\d+\.", name)]:
        return f"{left} is left"
    if not re.match(r"resumed from .*/[^.]+ at step \d+$", first.message):
        is_empty = first.message.startswith("nothing to resume") and not recording.must_hold_one(count)
        return "" if is_empty else first.message
    found = (first.step, tuple(rank.digest for rank in ranks))
    return "" if found in map(_identity, recording.allowed(count)) else f"{first.message}, but with other values"


def _identity(save: Saved) -> tuple[int, tuple[str, ...]]:
    return save.step, save.digests
