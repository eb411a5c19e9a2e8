"""Saves in the background: what they save, and how they fail."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.local_files import LocalSink
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.saver import Saver
from internlm.core.trainer import Hook, Trainer
from internlm.utils.errors import exit_on_user_error
from tests.dist.whole_runs import build_run, checkpoint_names, fit, manifest_in, resume, save_of, saving, wait_for_saves
from tests.harness.pool import run_ranks


def leave_with_a_failing_save(file: str, is_decorated: str) -> None:
    """Save in the background to a folder that is a file, in a main function that returns at once."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def main() -> None:
        saver = Saver(LocalStorage(file), lambda: None, lambda step: (), lambda: None, Exchange())
        saver.save(save_of(1), {"a": LogicalTensor.whole(torch.ones(2))}, background=True)

    (exit_on_user_error(main) if is_decorated else main)()


@pytest.mark.parametrize(("is_decorated", "code"), [("yes", 2), pytest.param("", 0, marks=pytest.mark.wide)])
def test_the_last_save_of_a_script_fails_in_the_background(is_decorated: str, code: int, tmp_path: Path) -> None:
    """Only a main function that is decorated can set the exit code."""
    (tmp_path / "file").touch()
    script = f"import sys\nfrom {__name__} import leave_with_a_failing_save as leave\nleave(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(tmp_path / "file"), is_decorated]
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert "file/step-1: cannot be saved (rank 0: " in line
    assert ("end a script with ckpt_manager.close()" in line) == (not is_decorated)
    assert done.returncode == code


@contextmanager
def _gated_files() -> Iterator[threading.Event]:
    """Keep this process from creating files of checkpoints in the ``with`` block, until the event is set."""
    is_open, create = threading.Event(), LocalStorage.create

    def create_later(storage: LocalStorage, name: str) -> LocalSink:
        assert not name.startswith("step-") or is_open.wait(30)
        return create(storage, name)

    LocalStorage.create = create_later  # type: ignore[method-assign]
    try:
        yield is_open
    finally:
        is_open.set()
        LocalStorage.create = create  # type: ignore[method-assign]


class _Gate(Hook):
    """Keeps this rank from writing a file of a checkpoint until a step begins; nothing is committed before."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def before_run(self, trainer: Trainer) -> None:
        self.stack = ExitStack()
        self.is_open = self.stack.enter_context(_gated_files())

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            assert not checkpoint_names(self.folder)
            dist.barrier()
            self.is_open.set()

    def after_run(self, trainer: Trainer) -> None:
        self.stack.close()


def test_what_is_saved_in_the_background_is_the_state_of_its_step(tmp_path: Path) -> None:
    """Although training went on before anything was written; the end of training waits for the last save."""
    keys = {"every": 2, "total": 5}
    at_once = fit(2, saving(tmp_path / "at once", **keys))
    folder = tmp_path / "later"
    later = fit(2, saving(folder, "ckpt.async_upload=True", **keys), hooks=[_Gate(3, folder / "ckpts")])
    assert later.log == at_once.log
    for step in ("step-2", "step-4", "step-5"):
        one, other = folder / "ckpts" / step, tmp_path / "at once" / "ckpts" / step
        assert manifest_in(one).tensors == manifest_in(other).tensors
        for file in ("rank-00000.bin", "rank-00001.bin"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
        states = [json.loads((folder / "state.json").read_text()) for folder in (one, other)]
        for key in ("train_state", "optimizer", "sampler"):
            assert states[0][key] == states[1][key]


def _save_twice(rank: int, world_size: int, overrides: list[str]) -> list[list[str]]:
    """Return the committed checkpoints after each save, and after waiting for the last."""
    manager = (builder := build_run(world_size, tuple(overrides), [])).checkpoints
    assert manager.storage is not None
    state, root, found = builder.trainer.state, Path(manager.storage.location), list[list[str]]()
    with _gated_files() as is_open, manager:
        state.step = 1
        manager.save(state)
        found.append(checkpoint_names(root))
        threading.Timer(0.2, is_open.set).start()
        state.step = 2
        manager.save(state)
        found.append([name for name in checkpoint_names(root) if name == "step-1"])
        manager.wait_async_upload_finish()
        found.append(checkpoint_names(root))
    return found


def test_at_most_one_save_is_in_the_background(tmp_path: Path) -> None:
    """The second save waits for the first one; a script may wait for either."""
    (found,) = run_ranks(1, _save_twice, saving(tmp_path, "ckpt.async_upload=True"))
    assert found == [[], ["step-1"], ["step-1", "step-2"]]


def _resume_during_a_save(rank: int, world_size: int, overrides: list[str]) -> list[bool]:
    """Return whether a save was unfinished when the ranks exchanged sizes to check the space."""
    manager = (builder := build_run(world_size, tuple(overrides), [])).checkpoints
    measure, was_busy = manager.content.bytes_of_checkpoint, list[bool]()

    def bytes_of_checkpoint() -> int:
        was_busy.append(manager._saver is not None and manager._saver.is_busy)
        return measure()

    with _gated_files() as is_open, manager:
        manager.save(builder.trainer.state)
        threading.Timer(0.2, is_open.set).start()
        manager.content.bytes_of_checkpoint = bytes_of_checkpoint  # type: ignore[method-assign]
        manager.try_resume_training(builder.trainer.state)
    return was_busy


def test_the_space_is_checked_after_the_save_in_the_background_which_uses_the_same_exchange(tmp_path: Path) -> None:
    overrides = saving(tmp_path, "ckpt.async_upload=True", "ckpt.auto_resume=False")
    assert run_ranks(1, _resume_during_a_save, overrides) == [[False]]


def _save_without_a_store(rank: int, world_size: int, overrides: list[str]) -> list[str]:
    """Save in the background where no group can be made any more, as after the launcher was killed."""
    manager = (builder := build_run(world_size, tuple(overrides), [])).checkpoints
    assert manager.storage is not None
    new_group = dist.new_group

    def fail(*args: Any, **keywords: Any) -> None:
        raise dist.DistNetworkError("the store is gone")

    with manager:
        manager.try_resume_training(builder.trainer.state)
        try:
            dist.new_group = fail  # type: ignore[assignment]
            manager.save(builder.trainer.state)
            manager.wait_async_upload_finish()
        finally:
            dist.new_group = new_group
    return checkpoint_names(Path(manager.storage.location))


def test_the_first_save_in_the_background_does_not_need_the_store_of_the_launcher(tmp_path: Path) -> None:
    assert run_ranks(1, _save_without_a_store, saving(tmp_path, "ckpt.async_upload=True")) == [["step-0"]]


class _NoRoom(Hook):
    """After the first save, files on one rank can't grow, as on a full disk."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 3 and dist.get_rank() == self.rank:
            self._limit(1000)

    def after_run(self, trainer: Trainer) -> None:
        self._limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    def _limit(self, size: int) -> None:
        wait_for_saves()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class _WaitAfter(Hook):
    """Before a step, let the save in the background end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            wait_for_saves()


@pytest.mark.parametrize("total", [4, 9])
def test_a_save_that_fails_in_the_background_ends_the_run(total: int, tmp_path: Path) -> None:
    """With one line on all ranks, after a step that all have done, or at the end; the checkpoint before is whole."""
    overrides = saving(tmp_path, "ckpt.async_upload=True", total=total)
    failed = fit(2, overrides, hooks=[_NoRoom(1), _WaitAfter(5)])
    assert failed.message.startswith(f"{tmp_path}/ckpts/step-4: cannot be saved (rank 1: ")
    assert "larger than the limit for files" in failed.message
    assert len(failed.message.splitlines()) == 1
    assert len(failed.ranks[0].log) == len(failed.ranks[1].log)
    assert len(failed.log) in ({4} if total == 4 else {5, 6})
    assert checkpoint_names(tmp_path / "ckpts") == ["step-2"]
    assert resume(2, saving(tmp_path)).state["step"] == 2


class _OtherOwner(Hook):
    """Another run takes the save folder over, which may have been stopped for too long."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step != 3:
            return
        wait_for_saves()  # of step 2, which is this run's
        if dist.get_rank() == 0:
            lease = json.loads((self.root / "lease.json").read_text())
            (self.root / "lease.json").write_text(json.dumps({**lease, "pid": 1, "token": "another"}))


@pytest.mark.parametrize("background", [False, True])
def test_a_run_whose_folder_has_another_owner_commits_nothing(background: bool, tmp_path: Path) -> None:
    overrides = saving(tmp_path, f"ckpt.async_upload={background}")
    failed = fit(2, overrides, hooks=[_OtherOwner(tmp_path / "ckpts"), _WaitAfter(5)])
    assert failed.message.startswith(f"{tmp_path}/ckpts/step-4: cannot be saved ({tmp_path}/ckpts: another run took it")
    assert failed.message.endswith("stop that run)")  # more space would not help
    assert failed.log[-1][0] in (3, 4, 5)
    assert checkpoint_names(tmp_path / "ckpts") == ["step-2"]
    assert json.loads((tmp_path / "ckpts" / "lease.json").read_text())["token"] == "another"
