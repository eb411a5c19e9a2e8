"""Save folder of a run: its checkpoints and snapshots, what earlier runs left in it, and what is deleted from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from internlm.checkpoint import format_1
from internlm.checkpoint.folder_checks import explain
from internlm.checkpoint.foreign_folders import foreign_save_folder
from internlm.checkpoint.lease import Lease
from internlm.checkpoint.saved_checkpoint import (
    OF_ONE_CHECKPOINT,
    find_checkpoints,
    names_of_checkpoint,
    not_followed,
    plain_names,
    read_outline,
    read_state,
)
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_reader import UnreadableCheckpointError
from internlm.checkpoint.verification import verify
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem
from internlm.utils.logger import get_logger

log = get_logger()

#: Names of the two snapshots, which are written in turns.
SNAPSHOTS = ("snapshot-0", "snapshot-1")


class SaveFolder:
    """Save folder, as one rank uses it for all ranks: no method is collective.

    All methods raise ``OSError`` where the storage fails.

    Args:
        storage: Storage of the folder.
        keep_last: Number of the newest checkpoints to keep; None: all.
        keep_every: Also keep the checkpoints whose step is a multiple of this number; None: no others.
    """

    def __init__(self, storage: Storage, keep_last: int | None = None, keep_every: int | None = None) -> None:
        self.storage, self.keep_last, self.keep_every = storage, keep_last, keep_every
        self._lease: Lease | None = None

    # -- owner --------------------------------------------------------------------------------------------------------
    def open(self, job: str, on_lost: Callable[[str], None]) -> list[str]:
        """Create the folder, become its owner, and remove what unfinished saves left.

        Args:
            job: Name of the job, by which other runs call the owner.
            on_lost: Function called in a thread with the reason if the folder gets another owner.

        Returns:
            Names of its committed checkpoints, newest first.

        Raises:
            CheckpointError: A live run owns the folder, or it is a checkpoint itself.
        """
        self.storage.prepare()
        self._check_holds_checkpoints()
        self._lease = Lease.acquire(self.storage, job, on_lost)
        return self.tidy()

    def check_owner(self) -> None:
        """Check that this run still owns the folder; called before each commit.

        Raises:
            CheckpointError: It does not.
        """
        lease = self._lease  # another thread may leave the folder
        if lease is None:
            raise CheckpointError(Problem(self.storage.location, "the run that is saving has ended"))
        lease.check()

    def close(self) -> None:
        """Leave the folder to other runs."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def tidy(self) -> list[str]:
        """Remove what unfinished saves and deletions left; return the names of the checkpoints, newest first.

        A checkpoint that an unfinished save was about to replace gets its name back. One that was replaced is removed
        if its successor verifies. Only the owner calls this, so no live run has an unfinished save there. What cannot
        be removed is left, with a warning: it takes space, but harms no checkpoint.
        """
        self.storage.sweep()
        for name in self.storage.restore():
            log.warning(f"restored {self.storage.path(name)}: the save that was to replace it is unfinished")
        committed = [entry.name for entry in find_checkpoints(self.storage) if entry.is_committed]
        for folder, checkpoint in self.storage.leftovers(settled=True).items():
            if folder not in committed:
                log.warning(f"ignored unfinished checkpoint {checkpoint} in {self.storage.location}")
            elif self._verifies(checkpoint):
                committed.remove(folder)
            else:  # the replaced one is what a run falls back to
                continue
            try:
                self.storage.remove(folder)
            except OSError as error:
                log.warning(f"{self.storage.path(folder)} cannot be deleted ({explain(error)})")
        return committed

    def _verifies(self, name: str) -> bool:
        try:
            return not verify(self.storage, name).problems
        except CheckpointError:
            return False

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def candidates(self) -> list[str]:
        """Return the names of the checkpoints to resume from, newest first; log the unfinished ones.

        Raises:
            CheckpointError: The folder has none, but those of another format; or it is a checkpoint itself.
        """
        self._check_holds_checkpoints()
        found = find_checkpoints(self.storage)
        for entry in found:
            if not entry.is_committed:
                log.warning(f"ignored unfinished checkpoint {entry.name} in {self.storage.location}")
        names = [entry.name for entry in found if entry.is_committed]
        for name in not_followed(self.storage):
            problem = Problem(self.storage.path(name), "is no folder, or a symbolic link, which is not followed")
            if not names:  # starting anew would lose the run
                todo = "Move the checkpoint there, or pass its path as ckpt.load_ckpt_info"
                raise CheckpointError(replace(problem, todo=todo))
            log.warning(problem)
        if not names and (foreign := foreign_save_folder(self.storage.location, partial(plain_names, self.storage))):
            raise CheckpointError(foreign)
        return names

    def saved_by(self, launcher: str) -> list[str]:
        """Return the names of the checkpoints that ranks of ``launcher`` have saved, newest first.

        Those that are damaged or out of reach are among them, since they may be its own: it must not fall back to an
        older one, or start anew, without a word.
        """
        names = [entry.name for entry in find_checkpoints(self.storage) if entry.is_committed]
        return [name for name in names if launcher and self._may_be_saved_by(launcher, name)]

    def _may_be_saved_by(self, launcher: str, name: str) -> bool:
        try:
            if format_1.COMMIT_FILE in names_of_checkpoint(self.storage, name):
                return False
            return read_state(self.storage, name, read_outline(self.storage, name)).launcher == launcher
        except (DamagedCheckpointError, UnreadableCheckpointError):
            return True
        except CheckpointError:  # a newer version wrote it
            return False

    def _check_holds_checkpoints(self) -> None:
        # A run that is given one of its checkpoints would find none in it, and start anew.
        if OF_ONE_CHECKPOINT & {*self.storage.names()}:
            todo = "Set ckpt.save_ckpt_folder to the folder around it, or load it with ckpt.load_ckpt_info"
            raise CheckpointError(Problem(self.storage.location, "is one checkpoint, not a folder of them", todo))

    def older_snapshot(self) -> int:
        """Return which of :data:`SNAPSHOTS` does not hold the newest snapshot."""
        newest = next((entry.name for entry in find_checkpoints(self.storage) if entry.name in SNAPSHOTS), None)
        return 1 - SNAPSHOTS.index(newest) if newest else 0

    def to_delete(self, step: int) -> Sequence[str]:
        """Return the names of the checkpoints that are not kept, after that of ``step`` was committed.

        None after a snapshot, which is soon replaced.
        """
        if self.keep_last is None:
            return ()
        found = [entry for entry in find_checkpoints(self.storage) if entry.is_committed and entry.is_readable]
        # A later checkpoint is damaged, since the run would have resumed from it: it must not push out a good one.
        steps = [entry.step for entry in found if entry.name == f"step-{entry.step}" and entry.step <= step]
        if step not in steps:
            return ()
        return [f"step-{old}" for old in not_kept(steps, self.keep_last, self.keep_every)]


def not_kept(steps: Collection[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Return the steps of the checkpoints to delete, oldest first.

    Args:
        steps: Steps of all committed checkpoints.
        keep_last: Number of the newest checkpoints to keep, at least 1.
        keep_every: Also keep the checkpoints whose step is a multiple of this number; None: no others.
    """
    older = sorted(steps)[:-keep_last]
    return [step for step in older if not keep_every or step % keep_every]
