"""Disks that are full or fail during a save (F9): at every call, on every rank, and a real file system."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from internlm.checkpoint.folder_checks import reason_of
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.saved_checkpoint import find_checkpoints
from internlm.checkpoint.storage import MANIFEST
from internlm.core.trainer_builder import TrainerBuilder
from internlm.utils.errors import UserError
from tests.dist.whole_runs import build_run, fit, recorded_warnings, resume, saving
from tests.faults.disk import Call, watched
from tests.faults.recorded_runs import Scenario, _scramble
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.samples import damage

#: Calls that need space.
GROWING = ("create", "write", "mkdir")
EVERY = (*GROWING, "sync", "rename", "remove")
#: What fails from a call on, or once: error, kinds of calls, and whether all later ones fail, too.
FAILURES = {
    "a full disk": (errno.ENOSPC, GROWING, True),
    "a quota": (errno.EDQUOT, GROWING, True),
    "a read-only folder": (errno.EROFS, EVERY, True),
    "one error of the disk": (errno.EIO, EVERY, False),
}


class _Failing:
    """Handler of calls that fails from the ``first`` one on, or at this one only."""

    def __init__(self, error: int, kinds: tuple[str, ...], lasting: bool, first: int) -> None:
        self.error, self.kinds, self.lasting, self.left = error, kinds, lasting, first
        self.failed = 0

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        if call.kind not in self.kinds:
            return perform()
        self.left -= 1
        if self.left > 0 or (self.failed and not self.lasting):
            return perform()
        self.failed += 1
        raise OSError(self.error, os.strerror(self.error))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A save during which calls failed on one rank."""

    failed: int
    """Number of calls that failed, on any rank."""
    message: str
    """Error of the save, the same on all ranks; empty if it succeeded."""
    is_good: bool
    """Whether the newest checkpoint verifies, and is the old or the new one."""
    left: list[str]
    """Names of unfinished checkpoints."""


def _save_each(rank: int, world_size: int, folder: Path, victim: int, name: str, stride: int) -> list[Attempt]:
    """Save again and again, and let a later call fail each time, until none does."""
    builder = build_run(world_size, tuple(Scenario().keys(folder)), [])
    root, attempts = folder / "ckpts", list[Attempt]()
    _save(builder)
    error, kinds, lasting = FAILURES[name]
    for first in range(1, 1000, stride):
        old = (root / "step-0" / MANIFEST).read_bytes()
        dist.barrier()
        _scramble(builder, 2.0)
        handler = _Failing(error, kinds, lasting, first if rank == victim else 1 << 30)
        with watched(root, handler), recorded_warnings():
            message = _save(builder)
        outcomes: list[Any] = [None] * world_size
        dist.all_gather_object(outcomes, (handler.failed, message))
        assert len({text for _, text in outcomes}) == 1, outcomes
        failed = sum(count for count, _ in outcomes)
        is_good, left = _state_of(root, old, bool(message))
        attempts.append(Attempt(failed=failed, message=message, is_good=is_good, left=left))
        dist.barrier()
        if not failed:
            break
        with recorded_warnings():
            _save(builder)  # what is left of the failure is no obstacle
    builder.checkpoints.close()
    return attempts


def _save(builder: TrainerBuilder) -> str:
    try:
        builder.checkpoints.save(builder.trainer.state)
        builder.checkpoints.wait_async_upload_finish()
    except UserError as error:
        return str(error)
    return ""


def _state_of(root: Path, old: bytes, has_failed: bool) -> tuple[bool, list[str]]:
    storage = LocalStorage(root)
    newest = next(entry.name for entry in find_checkpoints(storage) if entry.is_committed)
    is_old = (root / newest / MANIFEST).read_bytes() == old
    # A failure may also be that it is unknown whether the disk has the new one.
    return not list(damage(storage, newest)) and (has_failed or not is_old), [*storage.leftovers()]


@pytest.mark.fault("F9")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("name", FAILURES)
def test_a_save_that_fails_at_any_call_leaves_the_last_checkpoint(
    name: str,
    victim: int,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
    tmp_path: Path,
) -> None:
    """All ranks raise one error that names the cause; with a full disk, the part that was written is removed."""
    error, kinds, _ = FAILURES[name]
    stride = 1 if request.config.getoption("--wide") else 4
    attempts = run_ranks(2, _save_each, tmp_path, victim, name, stride, timeout=200)[0]
    *failing, last = attempts
    record_property("faults", len(failing))
    assert len(failing) > 3
    assert (last.failed, last.message, last.is_good) == (0, "", True)
    for attempt in failing:
        assert attempt.failed
        assert attempt.is_good, attempt
        if attempt.message:
            assert "step-0: cannot be saved (" in attempt.message
            assert reason_of(OSError(error, os.strerror(error))) in attempt.message
        if kinds == GROWING:
            assert not attempt.left, attempt
    assert sum(bool(attempt.message) for attempt in failing) > len(failing) / 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.fault("F9")
@pytest.mark.parametrize("overrides", [(), ("ckpt.async_upload=True",)], ids=["in the foreground", "in the background"])
def test_a_run_on_a_disk_that_is_full_after_its_first_checkpoint(
    overrides: tuple[str, ...], small_disk: Path, tmp_path: Path
) -> None:
    run = saving(tmp_path, f"ckpt.save_ckpt_folder=local:{small_disk / 'ckpts'}", *overrides)
    failed = fit(2, run)
    assert "step-4: cannot be saved (" in failed.message
    assert "o space" in failed.message
    assert [name for name in os.listdir(small_disk / "ckpts") if name.startswith("step-")] == ["step-2"]
    assert resume(2, run).message.startswith("No space: need ")  # of the next checkpoint, before the first step
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert resume(2, run).message == f"resumed from {small_disk}/ckpts/step-2 at step 2"
