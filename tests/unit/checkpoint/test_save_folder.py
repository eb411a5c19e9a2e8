"""Save folders: what is found in them, and what is deleted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from internlm.checkpoint import tensor_writer
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.save_folder import SaveFolder, not_kept
from internlm.checkpoint.saved_checkpoint import find_checkpoints, open_checkpoint
from internlm.checkpoint.tensor_reader import UnreadableCheckpointError
from internlm.utils.errors import CheckpointError, DamagedCheckpointError
from tests.unit.checkpoint.samples import complete, in_ranges, run_state, save


def saved(root: Path, name: str, step: int) -> Path:
    return save(root / name, {"model/w": in_ranges(torch.ones(2), [])}, step)


def test_checkpoints_and_snapshots_come_newest_first_by_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        saved(tmp_path, f"step-{step}", step)
    saved(tmp_path, "snapshot-0", 50)
    saved(tmp_path, "snapshot-1", 100)
    complete(tmp_path / "step-30")  # of format 1
    for name in ("step-x", "step-", "logs", "my-step-3", "step-5.old", "step-200"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").write_text("a file")
    (tmp_path / "step-8").symlink_to(tmp_path / "step-9")
    found = find_checkpoints(LocalStorage(tmp_path))
    assert [entry.name for entry in found if not entry.is_committed] == ["step-200"]
    committed = [entry.name for entry in found if entry.is_committed]
    assert committed == ["step-100", "snapshot-1", "snapshot-0", "step-30", "step-20", "step-9"]
    assert SaveFolder(LocalStorage(tmp_path)).candidates() == committed
    assert SaveFolder(LocalStorage(tmp_path)).older_snapshot() == 0


def test_a_snapshot_whose_manifest_cannot_be_read_is_the_last_candidate(tmp_path: Path) -> None:
    """It may be newer than all, but none of its content can be loaded."""
    saved(tmp_path, "snapshot-0", 50)
    saved(tmp_path, "step-20", 20)
    (tmp_path / "snapshot-0" / "manifest.json").write_bytes(b"")
    assert SaveFolder(LocalStorage(tmp_path)).candidates() == ["step-20", "snapshot-0"]


def test_a_folder_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    folder = SaveFolder(LocalStorage(tmp_path / "none"))
    assert (folder.candidates(), folder.older_snapshot(), folder.to_delete(3)) == ([], 0, ())


@pytest.mark.parametrize("make", [lambda path: save(path, {}, 5), complete], ids=["format 2", "format 1"])
def test_a_checkpoint_is_no_save_folder(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """A run would find no checkpoint in it, start anew, and save into it."""
    make(tmp_path / "step-5")
    expected = "step-5: is one checkpoint, not a folder of them. Set ckpt.save_ckpt_folder to the folder around it"
    folder = SaveFolder(LocalStorage(tmp_path / "step-5"))
    with pytest.raises(CheckpointError, match=expected):
        folder.candidates()
    with pytest.raises(CheckpointError, match=expected):
        folder.open("job", lambda reason: None)
    assert SaveFolder(LocalStorage(tmp_path)).candidates() == ["step-5"]


@pytest.mark.parametrize(("limit", "file"), [("LARGEST_STATE", "state.json"), ("LARGEST_MANIFEST", "manifest.json")])
def test_a_file_that_could_not_be_read_is_not_published(
    limit: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_writer, limit, 100)
    with pytest.raises(CheckpointException, match=rf"has \d+ bytes, at most 100 can be read: .*/{file}"):
        saved(tmp_path, "step-1", 1)
    assert SaveFolder(LocalStorage(tmp_path)).candidates() == []


def test_what_unfinished_saves_left_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, "step-20", 20)
    saved(tmp_path, "step-30", 30).rename(tmp_path / "step-30.tmp-ab")
    saved(tmp_path, "step-10", 10).rename(tmp_path / "step-10.deleting-ab")
    shutil.copytree(tmp_path / "step-20", tmp_path / "step-20.replaced-ab")
    assert SaveFolder(LocalStorage(tmp_path)).tidy() == ["step-20"]
    assert os.listdir(tmp_path) == ["step-20"]


def test_what_cannot_be_deleted_is_told_and_hinders_no_start(
    unprivileged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (20, 30):
        saved(unprivileged, f"step-{step}", step)
    storage = LocalStorage(unprivileged)
    (unprivileged / "step-20").chmod(0o500)
    with pytest.raises(PermissionError) as caught:  # which the run logs
        storage.withdraw("step-20", "ab")
    left = unprivileged / "step-20.deleting-ab"
    assert caught.value.filename == str(left)
    saved(unprivileged, "step-40", 40).rename(unprivileged / "step-40.tmp-ab")
    assert SaveFolder(storage).tidy() == ["step-30"]
    assert sorted(os.listdir(unprivileged)) == ["step-20.deleting-ab", "step-30"]
    assert f"{left} cannot be deleted ({left}: permission denied)" in caplog.messages
    left.chmod(0o700)


def test_a_checkpoint_that_was_not_replaced_after_all_gets_its_name_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the two renames by which a save replaces a checkpoint, the second is missing."""
    saved(tmp_path, "step-40", 40).rename(tmp_path / "step-40.replaced-ab")
    saved(tmp_path, "step-40", 40).rename(tmp_path / "step-40.tmp-cd")
    assert SaveFolder(LocalStorage(tmp_path)).tidy() == ["step-40"]
    assert os.listdir(tmp_path) == ["step-40"]
    assert f"restored {tmp_path}/step-40: the save that was to replace it is unfinished" in caplog.text


def test_a_replaced_checkpoint_is_kept_until_its_successor_verifies(tmp_path: Path) -> None:
    shutil.copytree(saved(tmp_path, "step-40", 40), tmp_path / "step-40.replaced-ab")
    content = (tmp_path / "step-40" / "rank-00000.bin").read_bytes()
    (tmp_path / "step-40" / "rank-00000.bin").write_bytes(bytes(len(content)))
    assert SaveFolder(LocalStorage(tmp_path)).tidy() == ["step-40", "step-40.replaced-ab"]
    (tmp_path / "step-40" / "rank-00000.bin").write_bytes(content)
    assert SaveFolder(LocalStorage(tmp_path)).tidy() == ["step-40"]
    assert os.listdir(tmp_path) == ["step-40"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, None, [10, 20, 30, 40]),
        (2, None, [10, 20, 30]),
        (5, None, []),
        (9, None, []),
        (1, 20, [10, 30]),
        (1, 7, [10, 20, 30, 40]),
        (3, 1, []),
    ],
)
def test_retention(keep_last: int, keep_every: int | None, expected: list[int]) -> None:
    assert not_kept([30, 10, 50, 20, 40], keep_last, keep_every) == expected


def test_a_later_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """The run resumed from step 20, since step 40 does not verify."""
    for step in (10, 20, 30, 40):
        saved(tmp_path, f"step-{step}", step)
    (tmp_path / "step-40" / "rank-00000.bin").write_bytes(b"")
    saved(tmp_path, "snapshot-0", 25)
    assert SaveFolder(LocalStorage(tmp_path), keep_last=1).to_delete(30) == ["step-10", "step-20"]
    assert SaveFolder(LocalStorage(tmp_path), keep_last=1, keep_every=20).to_delete(30) == ["step-10"]
    assert SaveFolder(LocalStorage(tmp_path)).to_delete(30) == ()


def test_neither_unfinished_checkpoints_nor_snapshots_count_among_those_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        saved(tmp_path, f"step-{step}", step)
    saved(tmp_path, "step-40", 40).rename(tmp_path / "step-40.tmp-ab")
    (tmp_path / "step-29").mkdir()
    saved(tmp_path, "snapshot-0", 28)
    folder = SaveFolder(LocalStorage(tmp_path), keep_last=2)
    assert folder.to_delete(30) == ["step-10"]
    # Nothing is deleted for a snapshot, which verifies, but is soon replaced.
    assert folder.to_delete(28) == ()


def test_a_link_in_place_of_a_checkpoint_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If there is nothing else to resume, the run must not start anew."""
    root, elsewhere = tmp_path / "ckpts", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "step-9").symlink_to(saved(elsewhere, "step-9", 9))
    folder, expected = SaveFolder(LocalStorage(root)), "step-9: is no folder, or a symbolic link, which is not followed"
    with pytest.raises(CheckpointError, match=expected):
        folder.candidates()
    saved(root, "step-3", 3)
    assert folder.candidates() == ["step-3"]
    assert sum(expected in record.getMessage() for record in caplog.records) == 1


def test_a_file_that_is_out_of_reach_is_no_damage(tmp_path: Path) -> None:
    """A run must not fall back to an older checkpoint since its network is down."""
    saved(tmp_path, "step-9", 9)
    for number, kind in ((errno.EIO, DamagedCheckpointError), (errno.ETIMEDOUT, UnreadableCheckpointError)):
        failing = FailingReads(tmp_path, number)
        with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read") as caught:
            open_checkpoint(failing, "step-9")
        assert type(caught.value) is kind


def test_a_checkpoint_whose_launcher_cannot_be_read_may_be_of_any(unprivileged: Path) -> None:
    """A job that is restarted must not skip its own, damaged checkpoints without a word."""
    for step in range(10, 80, 10):
        saved(unprivileged, f"step-{step}", step)
    complete(unprivileged / "step-80")  # of format 1, which no launcher of today has saved
    (unprivileged / "step-20" / "manifest.json").write_bytes(b"")
    (unprivileged / "step-30" / "manifest.json").unlink()
    (unprivileged / "step-40" / "state.json").unlink()
    (unprivileged / "step-50" / "state.json").chmod(0)
    (unprivileged / "step-60").chmod(0)
    (unprivileged / "step-70" / "rank-00000.bin").write_bytes(b"")  # its launcher can be read
    folder, launcher, doubtful = SaveFolder(LocalStorage(unprivileged)), run_state()["launcher"], range(60, 10, -10)
    assert folder.saved_by("boot/pid:[1]/8/88") == [f"step-{step}" for step in doubtful]
    assert folder.saved_by(launcher) == ["step-70", *(f"step-{step}" for step in doubtful), "step-10"]
    assert folder.saved_by("") == []
    (unprivileged / "step-60").chmod(0o700)


def test_a_folder_that_cannot_be_read_hides_no_other_and_is_not_skipped(unprivileged: Path) -> None:
    """It may be whole, so a run that would resume from it ends; a newer one is loaded."""
    for name, step in (("step-10", 10), ("step-20", 20), ("step-30", 30), ("snapshot-0", 15)):
        saved(unprivileged, name, step)
    (unprivileged / "step-20").chmod(0)
    folder = SaveFolder(LocalStorage(unprivileged), keep_last=1)
    assert folder.tidy() == folder.candidates() == ["step-30", "step-20", "snapshot-0", "step-10"]
    assert folder.to_delete(30) == ["step-10"]
    (unprivileged / "snapshot-0").chmod(0)  # of an unknown step, which may be the newest
    assert folder.candidates() == ["snapshot-0", "step-30", "step-20", "step-10"]
    for name in ("snapshot-0", "step-20"):
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(permission denied\). Make it") as caught:
            open_checkpoint(folder.storage, name)
        assert type(caught.value) is UnreadableCheckpointError
        (unprivileged / name).chmod(0o700)


class FailingReads(LocalStorage):
    """Storage whose files cannot be read."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self.number = number

    def read(self, name: str, limit: int) -> bytes:
        raise OSError(self.number, os.strerror(self.number), self.path(name))
