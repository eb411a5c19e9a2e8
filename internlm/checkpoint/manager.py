"""Checkpoint manager: when a run saves, from which checkpoint it continues, and which checkpoints it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from internlm.checkpoint import compatibility
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.folder_checks import check_shared, check_space, explain, on_first_rank, reason_of, todo_at
from internlm.checkpoint.hf_runs import check_run_exportable, export_of_run, lacks_export, load_run_from_folder
from internlm.checkpoint.lease import is_restart, this_launcher
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.logical_tensors import model_tensors
from internlm.checkpoint.run_content import ALL, Resumable, RunContent, Sampler
from internlm.checkpoint.run_state import RunState, check_saveable
from internlm.checkpoint.save_folder import SNAPSHOTS, SaveFolder
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.checkpoint.saver import Saver
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_writer import Save
from internlm.config.schema import CkptConfig
from internlm.config.schema.root import CheckpointContent
from internlm.core.context.random import RandomStreams
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.compat import naming_current_call
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem, UserError
from internlm.utils.logger import get_logger

log = get_logger()

TODO = "Choose a writable folder with free space"
T = TypeVar("T")


class CheckpointManager:
    """Manager that saves checkpoints on schedule and resumes from the newest one that verifies.

    It saves every ``checkpoint_every`` steps and at ``total_steps``.

    Args:
        config: The ``ckpt`` section of the config.
        model: Model of this rank, with a placement for each parameter.
        optimizer: Optimizer of ``model``.
        streams: Random streams of this rank.
        total_steps: Last step of the run, which is always saved.
        run_info: JSON-serialisable entries, saved with each checkpoint; see :class:`RunContent`.
        sampler: Training loader, whose data position is saved and restored.

    Use it as a context manager, or call :meth:`close` at the end of the run.
    """

    @naming_current_call("internlm.train.initialize_checkpoint_manager(model, optimizer, train_dl)")
    def __init__(
        self,
        config: CkptConfig,
        model: nn.Module,
        optimizer: HybridZeroOptimizer,
        streams: RandomStreams,
        total_steps: int,
        run_info: dict[str, Any],
        sampler: Sampler,
    ) -> None:
        self.config, self.total_steps, self.run_info = config, total_steps, run_info
        self.exchange = Exchange()
        """Exchange between all ranks, whose ``timeout`` also limits how long a rank waits for the others in a save in
        the background."""
        self.content = RunContent(
            model,
            optimizer,
            streams,
            sampler,
            run_info,
            self.exchange,
            config,
        )
        self.storage = open_storage(config.save_ckpt_folder) if config.save_ckpt_folder else None
        self.folder = SaveFolder(self.storage, config.keep_last, config.keep_every) if self.storage else None
        self.last_saved = -1
        self.resumed_folder: str | None = None
        """Folder of the records of the run that is resumed, if its checkpoints are still where it saved them."""
        self.on_failure: Callable[[], None] | None = None
        """Function called in a thread of each rank after a save in the background has failed; the next save, or
        :meth:`wait_async_upload_finish`, raises the error."""
        self.on_lost: Callable[[], None] | None = None
        """Function called in a thread of rank 0 after the save folder got another owner; no save can be committed
        any more."""
        self._saver: Saver | None = None
        self._next_slot: int | None = None
        self._is_prepared = False

    # -- saving -------------------------------------------------------------------------------------------------------
    # No result: loops of existing scripts end if it is true.
    def try_save_checkpoint(self, state: Resumable, force: bool = False) -> None:
        """Save a checkpoint or a snapshot if one is due at this step, or a checkpoint if ``force`` is set.

        Collective: all ranks must call it in the same step.

        Raises:
            CheckpointError: A rank cannot write, now or in the last save in the background.
        """
        every = self.config.checkpoint_every  # None or 0: only the last step
        due = force or state.step == self.total_steps or bool(every and state.step % every == 0)
        snapshot = self.config.oss_snapshot_freq
        if not self.config.enable_save_ckpt or state.step == self.last_saved:
            # A signal may force a save of the step that was just saved on schedule.
            return
        if due:
            self.save(state)
            if self.config.enable_internevo2hf_ckpt and state.step == self.total_steps:
                self._export(f"step-{state.step}")
        elif snapshot and state.step % snapshot == 0:
            self._save(state, self._snapshot_name())

    def wait_async_upload_finish(self) -> None:
        """Block until the save in the background is committed; collective.

        Raises:
            CheckpointError: It failed.
        """
        if self._saver is not None:
            self._saver.wait()

    def close(self) -> None:
        """End the use of the save folder, after the save in the background; collective.

        Raises:
            CheckpointError: The save in the background failed.
        """
        try:
            self.wait_async_upload_finish()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self.folder is not None:
            self.folder.close()
        self._is_prepared = False

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, UserError):
            # All ranks raise it, so the save in the background can be completed. The first error is the one to report.
            with suppress(CheckpointError):
                self.close()
        elif self._saver is None or not self._saver.is_busy:  # else the lease is released when the process ends
            self._leave()

    def _failed(self) -> None:
        if self.on_failure is not None:
            self.on_failure()

    def _lost(self, reason: str) -> None:
        if self.on_lost is not None:
            self.on_lost()

    def save(self, state: Resumable) -> str:
        """Save the checkpoint ``step-N`` and return its path; collective.

        With ``ckpt.async_upload``, the checkpoint is written in the background, and not committed yet.

        Raises:
            CheckpointError: A rank cannot write, or the config names no folder. Older checkpoints are unchanged.
        """
        path = self._save(state, f"step-{state.step}")
        self.last_saved = state.step
        return path

    def _save(self, state: Resumable, name: str) -> str:
        if self.storage is None or self.folder is None:
            raise CheckpointError(
                Problem("ckpt.save_ckpt_folder", "names no folder to save to", "Set it in the config")
            )
        if not self._is_prepared:
            self._warn_of(self._prepare())
            self._check_space()
        if self._saver is None:
            self._saver = Saver(
                self.storage, self.folder.check_owner, self.folder.to_delete, self._failed, self.exchange
            )
        self.wait_async_upload_finish()  # it uses the exchange, too
        content = self.content.state(state, self._own_root())
        save = Save(checkpoint=name, step=state.step, state=content)
        self._saver.save(save, self.content.tensors(), background=self.config.async_upload)
        return self.storage.path(name)

    def _export(self, name: str) -> None:
        """Write the checkpoint ``name`` as a Hugging Face folder too, on rank 0 while the others block."""
        config = self.run_info["config"]
        # From what is committed, so that parameters need not be gathered on any rank.
        path = self._on_first_rank(lambda folder: export_of_run(folder.storage, name, config))
        log_first(f"saved {path} for Hugging Face")

    def _make_up_export(self, step: int) -> None:
        """Export the last checkpoint, if the run ended after it was saved and before its export was complete."""
        config, name = self.config, f"step-{step}"
        if not (config.enable_save_ckpt and config.enable_internevo2hf_ckpt and step == self.total_steps):
            return
        if self._on_first_rank(lambda folder: lacks_export(folder.storage, name)):
            self._export(name)

    def _snapshot_name(self) -> str:
        """Return the name of the next snapshot: that of the older one, then in turns."""
        if self._next_slot is None:
            self._next_slot = self._on_first_rank(lambda folder: folder.older_snapshot())
        name, self._next_slot = SNAPSHOTS[self._next_slot], 1 - self._next_slot
        return name

    def _on_first_rank(self, action: Callable[[SaveFolder], T]) -> T:
        """Return the result of ``action`` on rank 0, while the other ranks block; if it fails, raise on all ranks."""
        self.wait_async_upload_finish()  # it uses the exchange, too
        folder = self.folder
        assert folder is not None

        def act() -> T:
            try:
                return action(folder)
            except OSError as error:
                where = self._own_root()
                message = reason_of(error) if error.filename == where else explain(error)
                raise CheckpointError(Problem(where, message, todo_at(where, error.errno, TODO))) from None

        # Rank 0 acts for all ranks: on a network file system, a new folder may become visible at different times.
        return on_first_rank(act, self.exchange)

    # -- loading ------------------------------------------------------------------------------------------------------
    def try_resume_training(self, state: Resumable, current_time: str = "") -> str:
        """Load the checkpoint that the config selects, if any; collective.

        If ``ckpt.auto_resume`` is set, the newest committed checkpoint in ``ckpt.save_ckpt_folder`` that verifies,
        snapshots included, takes precedence over ``ckpt.load_ckpt_info``. Otherwise, so do those that this job has
        saved before its launcher restarted it.

        Args:
            state: Counters to restore, ``trainer.state``.
            current_time: Ignored; existing InternEvo scripts pass it.

        Returns:
            Message for the log: the loaded checkpoint, or that there is none.

        Raises:
            CheckpointError: The checkpoint does not match the run; or none of those in the save folder verifies; or
                the save folder is not writable, or only holds checkpoints of another format.
        """
        existing = self._prepare() if self.config.enable_save_ckpt else []
        message = self._resume(state)
        if message:
            self._make_up_export(state.step)
        else:
            self._warn_of(existing)
        if not message and self.config.load_ckpt_info is not None:
            info = self.config.load_ckpt_info
            found = ""
            if info.ckpt_type == "internevo":
                self.load(info.path, state, info.content)
            else:
                found = f" ({load_run_from_folder(self.content, info)})"
            message = f"nothing to resume; loaded {', '.join(info.content)} from {info.path}{found}"
        message = message or "nothing to resume; starting from step 0"
        log_first(message)
        if self.config.enable_save_ckpt and state.step < self.total_steps:  # else nothing will be saved
            self._check_space()
        if state.step >= self.total_steps and dist.get_rank() == 0:
            log.warning(f"already at step {state.step}, and data.total_steps is {self.total_steps}: nothing to train")
        return message

    def load(self, source: str | Path, state: Resumable, content: Iterable[CheckpointContent]) -> RunState:
        """Load ``content`` from the checkpoint at ``source``; collective.

        Args:
            source: Path or address of the checkpoint.
            state: Progress counters to restore.
            content: Content to load; "all" includes the random streams.

        Returns:
            Content of the checkpoint's state file.

        Raises:
            CheckpointError: On some rank, the checkpoint does not match the run, or does not verify. In the latter
                case, content may have been overwritten.
        """
        location, name = split_checkpoint(str(source))
        return self._load(open_storage(location), name, state, content)

    def _load(self, storage: Storage, name: str, state: Resumable, content: Iterable[CheckpointContent]) -> RunState:
        self.wait_async_upload_finish()  # it uses the exchange, too
        saved = self.content.load(storage, name, state, content)
        # A just loaded checkpoint need not be saved again.
        self.last_saved = state.step if {*content} >= ALL or "all" in content else -1
        return saved

    def _resume(self, state: Resumable) -> str:
        """Load the newest checkpoint of the save folder that verifies; return a message, empty if there is none.

        Without ``ckpt.auto_resume``, of those that this job has saved before it was restarted.
        """
        if self.storage is None:
            return ""
        names = self._on_first_rank(self._names_to_resume)
        for index, name in enumerate(names):
            try:
                saved = self._load(self.storage, name, state, ("all",))
            except DamagedCheckpointError as error:
                if name == names[-1]:  # starting anew would silently lose the run
                    message, todo = "none of its checkpoints verifies", "Restore one, or choose another folder"
                    raise CheckpointError(*error.problems, Problem(self._own_root(), message, todo)) from None
                if dist.get_rank() == 0:
                    log.warning(f"{name} does not verify: {error.problems[0]}")
                continue
            if name in SNAPSHOTS:
                # The other one is older, or does not verify.
                self._next_slot = 1 - SNAPSHOTS.index(name)
            # A copy of the checkpoints starts a variation of the run, which must not write into the run's records.
            if saved.save_folder == self._own_root():
                self.resumed_folder = saved.run_folder
            because = f" ({', '.join(names[:index])} did not verify)" if index else ""
            return f"resumed from {self.storage.path(name)} at step {state.step}{because}"
        return ""

    def _names_to_resume(self, folder: SaveFolder) -> list[str]:
        if self.config.auto_resume:
            return folder.candidates()
        # On rank 0 only, since the launchers of several hosts may differ in their number of restarts.
        return folder.saved_by(this_launcher()) if is_restart() else []

    def _own_root(self) -> str:
        return self.storage.location if self.storage else ""

    def _prepare(self) -> list[str]:
        """Prepare the save folder before its first use; return the checkpoints that it holds; collective."""
        if self._is_prepared:
            return []
        assert self.storage is not None, "the config check requires a folder if saving is enabled"
        check_saveable(self.run_info)
        if self.config.enable_internevo2hf_ckpt:
            check_run_exportable(self.run_info["config"])
        if self.config.async_upload:
            # Before the first step: a save must not need the launcher's store, which may be gone by then.
            self.exchange.separate()
        job = str(self.run_info["config"].get("JOB_NAME", ""))
        existing = self._on_first_rank(lambda folder: folder.open(job, self._lost))
        self._is_prepared = True
        check_shared(self.storage, self.exchange)
        return existing

    def _warn_of(self, existing: list[str]) -> None:
        """Warn of the checkpoints ``existing`` of an earlier run that is not resumed."""
        if existing and not self.config.auto_resume and dist.get_rank() == 0:
            log.warning(
                f"{self._own_root()} contains {', '.join(existing[:3])} of an earlier run, which is not resumed "
                "(ckpt.auto_resume=False) and will mix with this one: choose another ckpt.save_ckpt_folder"
            )

    def _check_space(self) -> None:
        """Check that there is space for one checkpoint; collective."""
        self.wait_async_upload_finish()  # it uses the exchange, too
        needed = self.content.bytes_of_checkpoint()
        self._on_first_rank(lambda folder: check_space(folder.storage, needed))


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Load the parameters and buffers of ``model`` from a checkpoint, without a process group.

    Args:
        model: Unsharded model, with a placement for each parameter.
        source: Path or address of the checkpoint.

    Raises:
        CheckpointError: ``source`` is not a committed checkpoint, does not verify, or does not match the model.
    """
    location, name = split_checkpoint(str(source))
    checkpoint = open_checkpoint(open_storage(location), name)
    tensors = checkpoint.as_stored(model_tensors(model))
    # Without a config to compare, only the tensors are checked.
    problems = [
        *compatibility.missing_tensors(checkpoint.where, checkpoint.metadata, tensors),
        *compatibility.unexpected_tensors(checkpoint.where, checkpoint.metadata, tensors),
    ]
    if problems:
        raise CheckpointError(*problems)
    checkpoint.read(tensors)


def log_first(message: str) -> None:
    """Log ``message`` on rank 0 only."""
    if dist.get_rank() == 0:
        log.info(message)
