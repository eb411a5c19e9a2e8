"""Checkpoint manager: saving, loading and resuming.

Phases of a save: (1) every rank writes the slices that it owns, (2) rank 0 writes ``state.json``, (3) rank 0 writes the
commit mark. A folder without the commit mark is an unfinished save and is never loaded.

Phases of a load: (1) every rank compares the checkpoint with its model and config, (2) the ranks all-gather the
problems found, and each raises all of them, (3) tensors are read into the memory of the model and the optimizer, (4)
the rest of the state is restored. Nothing is changed before (3), so a refused checkpoint leaves a usable run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from internlm.checkpoint import compatibility, save_folder
from internlm.checkpoint.foreign_folders import foreign_save_folder, names_in_local
from internlm.checkpoint.logical_tensors import (
    LogicalTensor,
    LogicalTensors,
    model_tensors,
    optimizer_tensors,
    without_rounded,
)
from internlm.checkpoint.run_state import OptimizerCounters, RunState, TrainCounters, current_versions
from internlm.checkpoint.tensor_files import SafeReader, read_tensors, write_tensors
from internlm.config.schema import CkptConfig
from internlm.config.schema.root import CheckpointContent
from internlm.core.context.random import RandomStreams
from internlm.data.batch_plan import Position
from internlm.ops.cpu.kernel_start import kernels_of_job, resume_kernels
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.compat import naming_current_call
from internlm.utils.errors import CheckpointError, Problem
from internlm.utils.logger import get_logger

log = get_logger()

#: Meaning of ``content=("all",)``. Random streams have no keyword: they are loaded only with all other content.
ALL: frozenset[CheckpointContent] = frozenset({"model", "optimizer", "scheduler", "sampler"})


class Resumable(Protocol):
    """Protocol for the progress counters of a run, which are saved in a checkpoint and restored from it."""

    step: int

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as a JSON-serialisable dict."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters."""


class Sampler(Protocol):
    """Protocol for a data sampler that can resume at a saved position."""

    def position(self, step: int) -> Position:
        """Return the data position before ``step``."""

    def resume(self, position: Position) -> None:
        """Continue from a data position that :meth:`position` returned, possibly in an earlier run."""


class CheckpointManager:
    """Manager that saves checkpoints on schedule and resumes from the newest complete one.

    It saves every ``checkpoint_every`` steps and at ``total_steps``.

    Args:
        config: The ``ckpt`` section of the config.
        model: Model of this rank, with a placement for each parameter.
        optimizer: Optimizer of ``model``.
        streams: Random streams of this rank.
        total_steps: Last step of the run, which is always saved.
        run_info: JSON-serialisable entries, saved with each checkpoint. Compared on loading: the resolved ``config``,
            the fingerprint of the ``data`` and the ``seed``. Not compared: ``run_folder``, that of the run's records.
        sampler: Training loader, whose data position is saved and restored.
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
        self.model, self.optimizer, self.streams = model, optimizer, streams
        self.sampler = sampler
        self.root = save_folder.local_path(config.save_ckpt_folder) if config.save_ckpt_folder else None
        self.last_saved = -1
        self.resumed_folder: str | None = None
        """Folder of the records of the run that is resumed, if its checkpoints are still where it saved them."""

    # -- saving -------------------------------------------------------------------------------------------------------
    # No result: loops of existing scripts end if it is true.
    def try_save_checkpoint(self, state: Resumable, force: bool = False) -> None:
        """Save a checkpoint if one is due at this step, or if ``force`` is set.

        Collective: all ranks must call it in the same step.

        Raises:
            CheckpointError: A rank cannot write.
        """
        every = self.config.checkpoint_every  # None or 0: only the last step
        due = force or state.step == self.total_steps or bool(every and state.step % every == 0)
        # A signal may force a save of the step that was just saved on schedule.
        if due and self.config.enable_save_ckpt and state.step != self.last_saved:
            self.save(state)

    def wait_async_upload_finish(self) -> None:
        """Do nothing, because a save is complete when its call returns; existing InternEvo scripts call it."""

    def save(self, state: Resumable) -> Path:
        """Write the checkpoint ``step-N`` and return its folder; collective.

        Raises:
            CheckpointError: A rank cannot write, or the config names no folder. The unfinished folder is removed; older
                checkpoints are unchanged.
        """
        if self.root is None:
            raise CheckpointError(
                Problem("ckpt.save_ckpt_folder", "names no folder to save to", "Set it in the config")
            )
        target = save_folder.step_folder(self.root, state.step)
        # With overlap_sync_param the all-gather of the last update may still be running.
        self.optimizer.gather_parameters()
        self._on_first_rank(lambda: _make_empty(target))
        try:
            write_tensors(target, self._tensors())
            self._on_first_rank(lambda: self._commit(target, state))
        except CheckpointError:
            self._on_first_rank(lambda: shutil.rmtree(target, ignore_errors=True))
            raise
        self.last_saved = state.step
        log_first(f"saved {target}")
        return target

    def _tensors(self) -> LogicalTensors:
        return {**model_tensors(self.model), **optimizer_tensors(self.optimizer), **self._random_tensors()}

    def _random_tensors(self) -> LogicalTensors:
        """Return this rank's RNG states, keyed by ``rng/<rank>/<stream>``.

        No other tensor of a checkpoint belongs to a particular rank.
        """
        return {
            f"rng/{dist.get_rank()}/{name}": LogicalTensor.whole(value)
            for name, value in self.streams.state_dict().items()
        }

    def _commit(self, target: Path, state: Resumable) -> None:
        """Write the state file, then the commit mark, which exists only if all other files reached the disk."""
        content = RunState(
            format=save_folder.FORMAT,
            train_state=TrainCounters(**state.state_dict()),
            optimizer=OptimizerCounters(**self.optimizer.state_dict()),
            sampler=list(self.sampler.position(state.step)),
            world_size=dist.get_world_size(),
            cpu_kernels=kernels_of_job(),
            save_folder=self._own_root(),
            versions=current_versions(),
            **self.run_info,
        )
        save_folder.write_durably(target / save_folder.STATE_FILE, content.to_bytes().decode())
        save_folder.write_durably(target / save_folder.COMMIT_FILE, "")

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Run ``action`` on rank 0 while the other ranks block; if it fails, raise on all ranks."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise CheckpointError(Problem(str(self.root), failure[0], "Choose a writable folder with free space"))

    # -- loading ------------------------------------------------------------------------------------------------------
    def try_resume_training(self, state: Resumable, current_time: str = "") -> str:
        """Load the checkpoint that the config selects, if any; collective.

        If ``ckpt.auto_resume`` is set, the newest complete checkpoint in ``ckpt.save_ckpt_folder`` takes precedence
        over ``ckpt.load_ckpt_info``.

        Args:
            state: Counters to restore, ``trainer.state``.
            current_time: Ignored; existing InternEvo scripts pass it.

        Returns:
            Message for the log: the loaded checkpoint, or that there is none.

        Raises:
            CheckpointError: The checkpoint does not match the run or is damaged, or the save folder is not writable or
                only holds checkpoints of another format.
        """
        if self.config.enable_save_ckpt:
            self._on_first_rank(self._prepare_root)
        newest = self._newest() if self.config.auto_resume else None
        if newest is not None:
            saved = self.load(newest, state, ("all",))
            # A copy of the checkpoints starts a variation of the run, which must not write into the run's records.
            if saved.save_folder == self._own_root():
                self.resumed_folder = saved.run_folder
            message = f"resumed from {newest} at step {state.step}"
        elif self.config.load_ckpt_info is not None:
            info = self.config.load_ckpt_info
            self.load(save_folder.local_path(info.path), state, info.content)
            message = f"nothing to resume; loaded {', '.join(info.content)} from {info.path}"
        else:
            message = "nothing to resume; starting from step 0"
        log_first(message)
        if state.step >= self.total_steps and dist.get_rank() == 0:
            log.warning(f"already at step {state.step}, and data.total_steps is {self.total_steps}: nothing to train")
        return message

    def _own_root(self) -> str:
        return str(self.root.resolve()) if self.root else ""

    def _newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None; collective."""
        # Rank 0 chooses for all ranks: on a network file system, a new folder may become visible at different times.
        choice: list[Path | Problem | None] = [None]

        def choose() -> None:
            if self.root is None:
                return
            for _, path in save_folder.steps_in(self.root):
                if save_folder.is_complete(path):
                    choice[0] = path
                    return
                log.warning(f"ignored unfinished checkpoint {path.name} in {self.root}")
            choice[0] = foreign_save_folder(str(self.root), names_in_local(self.root))

        self._on_first_rank(choose)
        dist.broadcast_object_list(choice, src=0)
        if isinstance(choice[0], Problem):
            raise CheckpointError(choice[0])
        return choice[0]

    def _prepare_root(self) -> None:
        """Create the save folder, check that it is writable, and warn if it contains another run's checkpoints."""
        assert self.root is not None, "the config check requires a folder if saving is enabled"
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root):
            pass
        existing = [path.name for _, path in save_folder.steps_in(self.root)]
        if existing and not self.config.auto_resume:
            log.warning(
                f"{self.root} contains {', '.join(existing[:3])} of an earlier run, which is not resumed "
                "(ckpt.auto_resume=False) and will mix with this one: choose another ckpt.save_ckpt_folder"
            )

    def load(self, source: Path, state: Resumable, content: Iterable[CheckpointContent]) -> RunState:
        """Load ``content`` from the checkpoint folder ``source``; collective.

        Args:
            source: Checkpoint folder ``step-N``.
            state: Progress counters to restore.
            content: Content to load; "all" includes the random streams.

        Returns:
            Content of the checkpoint's state file.

        Raises:
            CheckpointError: On some rank, ``source`` is damaged or does not match the run. Raised on all ranks, before
                any state is changed.
        """
        content = set(content)
        wanted = set(ALL) if "all" in content else content
        # An all-gather that is still running would overwrite loaded parameters with old values.
        self.optimizer.gather_parameters()
        reader = SafeReader(source)
        tensors = self._wanted_tensors(wanted)
        known = _names_on_all_ranks(tensors)
        # Every rank reads the metadata, which is small: a file system that differs between ranks is detected here.
        with _failing_together():
            saved, metadata = save_folder.read_state(source), reader.read_metadata()
            problems = [
                *self._tensor_problems(str(source), saved, metadata, tensors, known, wanted),
                *(
                    compatibility.other_samples(str(source), saved.model_dump(), self.run_info)
                    if "sampler" in wanted
                    else ()
                ),
                *compatibility.damaged_files(source, metadata),
            ]
            if problems:
                raise CheckpointError(*problems)
        if wanted == ALL:
            # With more ranks than at the save, some streams are missing; they keep their states from the seed.
            streams = self._random_tensors()
            tensors |= {name: tensor for name, tensor in streams.items() if name in metadata.state_dict_metadata}
        read_tensors(source, reader, without_rounded(tensors))
        self._restore(saved, tensors, state, wanted)
        return saved

    def _wanted_tensors(self, wanted: set[CheckpointContent]) -> LogicalTensors:
        tensors = model_tensors(self.model) if "model" in wanted else {}
        return {**tensors, **(optimizer_tensors(self.optimizer) if "optimizer" in wanted else {})}

    def _tensor_problems(
        self,
        source: str,
        saved: RunState,
        metadata: Metadata,
        tensors: LogicalTensors,
        known: set[str],
        wanted: set[CheckpointContent],
    ) -> Iterator[Problem]:
        """Compare the config and the tensors of the checkpoint with those of the run; yield a problem per difference.

        Tensors are compared only if the configs match: with another architecture, nearly every tensor would differ.

        Args:
            source: Checkpoint folder, for error messages.
            saved: Content of the checkpoint's state file.
            metadata: Metadata of the checkpoint's tensors.
            tensors: Tensors that this rank loads.
            known: Names of the tensors that at least one rank loads.
            wanted: Parts of the checkpoint to load, such as "model" and "optimizer".
        """
        then, now = saved.config, self.run_info["config"]
        problems = list(compatibility.other_architecture(source, then, now))
        problems += compatibility.other_dtype(source, then, now) if "optimizer" in wanted else []
        yield from problems
        if not problems:
            yield from compatibility.missing_tensors(source, metadata, tensors)
            yield from compatibility.unexpected_tensors(source, metadata, known) if "model" in wanted else ()
            yield from compatibility.other_states(source, metadata, known) if "optimizer" in wanted else ()

    def _restore(
        self, saved: RunState, tensors: LogicalTensors, state: Resumable, wanted: set[CheckpointContent]
    ) -> None:
        """Restore the state that was not read directly into the model and the optimizer."""
        if "optimizer" in wanted:
            self.optimizer.load_state_dict(saved.optimizer.model_dump())
            if "model" not in wanted:
                self.optimizer.copy_main_to_model_params()
        else:
            # Main parameters still hold the initial values; the first update would write them back to the model.
            self.optimizer.copy_model_to_main_params()
        # Learning-rate schedules are functions of the step, so they have no state.
        if wanted & {"scheduler", "sampler"}:
            state.load_state_dict(saved.train_state.model_dump())
        if "sampler" in wanted:
            self.sampler.resume(saved.position)
        if wanted == ALL:
            resume_kernels(saved.cpu_kernels)
        self.last_saved = state.step if wanted == ALL else -1  # a just loaded checkpoint need not be saved again
        streams = {name.rsplit("/", 1)[1]: t.slices[(0,)] for name, t in tensors.items() if name.startswith("rng/")}
        if streams:
            self.streams.load_state_dict(streams)


def load_weights(model: nn.Module, source: Path) -> None:
    """Load the parameters and buffers of ``model`` from a checkpoint, without a process group.

    Args:
        model: Unsharded model, with a placement for each parameter.
        source: Checkpoint folder ``step-N``.

    Raises:
        CheckpointError: ``source`` is not a complete checkpoint, or does not match the model.
    """
    save_folder.read_state(source)
    reader = SafeReader(source)
    tensors = model_tensors(model)
    metadata = reader.read_metadata()
    # Without a config to compare, only the tensors are checked.
    problems = [
        *compatibility.missing_tensors(str(source), metadata, tensors),
        *compatibility.unexpected_tensors(str(source), metadata, tensors),
        *compatibility.damaged_files(source, metadata),
    ]
    if problems:
        raise CheckpointError(*problems)
    read_tensors(source, reader, tensors, collective=False)


def _names_on_all_ranks(tensors: LogicalTensors) -> set[str]:
    """All-gather the tensor names of all ranks; a pipeline stage has only those of its own layers."""
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, list(tensors))
    return {name for rank in names for name in rank}


@contextmanager
def _failing_together() -> Iterator[None]:
    """Gather the checkpoint problems that the ``with`` block raises on any rank, and raise them on all ranks.

    Otherwise ranks without a problem would block in the next collective until it times out.
    """
    found: tuple[Problem, ...] = ()
    try:
        yield
    except CheckpointError as error:
        found = error.problems
    gathered: list[tuple[Problem, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if problems := dict.fromkeys(problem for rank in gathered for problem in rank):
        raise CheckpointError(*problems)


def _make_empty(target: Path) -> None:
    """Create an empty checkpoint folder, after removing an earlier save of the same step."""
    # Remove the commit mark first: after an interrupted removal, the rest must not count as a complete checkpoint.
    (target / save_folder.COMMIT_FILE).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)


def log_first(message: str) -> None:
    """Log ``message`` on rank 0 only."""
    if dist.get_rank() == 0:
        log.info(message)
