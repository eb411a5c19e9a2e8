"""Saving and resuming.

A save, in phases: every rank writes the boxes it holds; rank 0 writes ``state.json``; then, last of all, the commit
mark. A folder without the mark is an unfinished save and is never loaded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from internlm.checkpoint import compatibility, storage
from internlm.checkpoint.logical import (
    Logical,
    LogicalLoadPlanner,
    LogicalSavePlanner,
    LogicalTensor,
    model_tensors,
    optimizer_tensors,
    without_rounded,
)
from internlm.checkpoint.storage import PlainWriter, SafeReader
from internlm.config.schema import CkptConfig
from internlm.core.context.random import RandomStreams
from internlm.data.batch_plan import Position
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.errors import CheckpointError, Problem
from internlm.utils.logger import get_logger

log = get_logger()

#: What ``content=("all",)`` means.
ALL = {"model", "optimizer", "scheduler", "sampler"}
#: What resuming reads of the state file.
STATE_KEYS = ("config", "train_state", "optimizer", "sampler", "data", "seed")


class Resumable(Protocol):
    """What the trainer knows about its progress."""

    step: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Sampler(Protocol):
    """What knows which samples come next, and can go on from there."""

    def position(self, step: int) -> Position: ...

    def resume(self, position: Position) -> None: ...


class CheckpointManager:
    """Saves every ``checkpoint_every`` steps and at ``total_steps``; resumes from the newest complete checkpoint.

    ``run_info`` (JSON) is saved with each checkpoint: resolved ``config``, ``data`` fingerprint and ``seed``.
    They are compared on loading.
    """

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
        self.root = storage.local_path(config.save_ckpt_folder) if config.save_ckpt_folder else None
        self.last_saved = -1

    # -- saving -------------------------------------------------------------------------------------------------------
    def try_save_checkpoint(self, state: Resumable, force: bool = False) -> bool:
        """Save if it is time to, or if ``force``; whether it was done. All ranks must call it in the same step."""
        every = self.config.checkpoint_every
        due = force or state.step == self.total_steps or (every is not None and state.step % every == 0)
        if not (due and self.config.enable_save_ckpt) or state.step == self.last_saved:
            return False
        self.save(state)
        return True

    def save(self, state: Resumable) -> Path:
        """Write ``step-N`` and return its folder."""
        assert self.root is not None, "the config's rules demand a folder where saving is on"
        target = storage.step_folder(self.root, state.step)
        self.optimizer.gather_parameters()
        self._on_first_rank(lambda: _make_empty(target))
        try:
            _write(target, self._tensors())
            self._on_first_rank(lambda: self._commit(target, state))
        except CheckpointError:
            self._on_first_rank(lambda: shutil.rmtree(target, ignore_errors=True))
            raise
        self.last_saved = state.step
        log_first(f"saved {target}")
        return target

    def _tensors(self) -> dict[str, Any]:
        return {**model_tensors(self.model), **optimizer_tensors(self.optimizer), **self._random_tensors()}

    def _random_tensors(self) -> Logical:
        """``rng/<rank>/<stream>``: each rank's random streams."""
        tensors: Logical = {}
        for name, value in self.streams.state_dict().items():
            tensors[f"rng/{dist.get_rank()}/{name}"] = _whole(value)
        return tensors

    def _commit(self, target: Path, state: Resumable) -> None:
        content = {
            "format": storage.FORMAT,
            "train_state": state.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.position(state.step),
            "world_size": dist.get_world_size(),
            **self.run_info,
        }
        storage.write_durably(target / storage.STATE_FILE, storage.to_text(content))
        storage.write_durably(target / storage.COMMIT_FILE, "")

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Let rank 0 act while the others wait; its failure is everybody's."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise CheckpointError(Problem(str(self.root), failure[0], "Choose a folder that can be written, with room"))

    # -- loading ------------------------------------------------------------------------------------------------------
    def try_resume_training(self, state: Resumable) -> str:
        """Load what the config says to start from, into the model, the optimizer and ``state``; say what was taken."""
        if self.config.enable_save_ckpt:
            self._on_first_rank(self._prepare_root)
        newest = self._newest() if self.config.auto_resume else None
        if newest is not None:
            self.load(newest, state, ("all",))
            message = f"resumed from {newest} at step {state.step}"
        elif self.config.load_ckpt_info is not None:
            info = self.config.load_ckpt_info
            self.load(storage.local_path(info.path), state, info.content)
            message = f"nothing to resume; loaded {', '.join(info.content)} from {info.path}"
        else:
            message = "nothing to resume; starting from step 0"
        log_first(message)
        if state.step >= self.total_steps and dist.get_rank() == 0:
            log.warning(f"already at step {state.step}, and data.total_steps is {self.total_steps}: nothing to train")
        return message

    def _newest(self) -> Path | None:
        """The newest complete checkpoint; every rank takes rank 0's word for it."""
        choice: list[str | None] = [None]

        def choose() -> None:
            for _, path in storage.steps_in(self.root) if self.root else ():
                if storage.is_complete(path):
                    choice[0] = str(path)
                    break
                log.warning(f"ignored unfinished checkpoint {path.name} in {self.root}")

        self._on_first_rank(choose)
        dist.broadcast_object_list(choice, src=0)
        return Path(choice[0]) if choice[0] else None

    def _prepare_root(self) -> None:
        """Find out now, not at the first save, whether the folder can be written, and whether it is another run's."""
        assert self.root is not None, "the config's rules demand a folder where saving is on"
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root):
            pass
        there = [path.name for _, path in storage.steps_in(self.root)]
        if there and not self.config.auto_resume:
            log.warning(
                f"{self.root} holds {', '.join(there[:3])} of an earlier run, which this one does not resume "
                "(ckpt.auto_resume is False) and will mix with: choose another ckpt.save_ckpt_folder"
            )

    def load(self, source: Path, state: Resumable, content: Iterable[str]) -> None:
        """Load ``content`` from ``source``; everything is compared, on all ranks, before anything is changed on any."""
        wants = set(ALL) if "all" in content else set(content)
        self.optimizer.gather_parameters()  # what is still on its way shall not come after what is loaded
        reader = SafeReader(source)
        tensors = self._wanted_tensors(wants)
        known = _known_to_any_rank(tensors)
        with _failing_together():
            saved, metadata = storage.read_state(source, STATE_KEYS), reader.read_metadata()
            problems = list(self._problems(source, saved, metadata, tensors, known, wants))
            if problems:
                raise CheckpointError(*problems)
        if wants == ALL:
            streams = self._random_tensors()
            tensors |= {name: tensor for name, tensor in streams.items() if name in metadata.state_dict_metadata}
        _read(source, reader, without_rounded(tensors))
        self._adopt(saved, tensors, state, wants)

    def _wanted_tensors(self, wants: set[str]) -> Logical:
        tensors = model_tensors(self.model) if "model" in wants else {}
        return {**tensors, **(optimizer_tensors(self.optimizer) if "optimizer" in wants else {})}

    def _problems(
        self,
        source: Path,
        saved: dict[str, Any],
        metadata: Metadata,
        tensors: Logical,
        known: set[str],
        wants: set[str],
    ) -> Iterator[Problem]:
        """What stands in the way. Of a model of another kind no tensors are listed beside. ``known``: names that any
        rank wants."""
        name, then, now = str(source), saved["config"], self.run_info["config"]
        other_kind = list(compatibility.other_architecture(name, then, now))
        other_kind += compatibility.other_dtype(name, then, now) if "optimizer" in wants else []
        yield from other_kind
        if not other_kind:
            yield from compatibility.missing_tensors(name, metadata, tensors)
            yield from compatibility.unexpected_tensors(name, metadata, known) if "model" in wants else ()
            yield from compatibility.other_states(name, metadata, known) if "optimizer" in wants else ()
        yield from compatibility.other_samples(name, saved, self.run_info) if "sampler" in wants else ()
        yield from compatibility.damaged_files(source, metadata)

    def _adopt(self, saved: dict[str, Any], tensors: Logical, state: Resumable, wants: set[str]) -> None:
        """Put what does not lie in the model's and optimizer's own memory where it belongs."""
        if "optimizer" in wants:
            self.optimizer.load_state_dict(saved["optimizer"])
            if "model" not in wants:
                self.optimizer.copy_main_to_model_params()
        else:
            self.optimizer.copy_model_to_main_params()
        if wants & {"scheduler", "sampler"}:
            state.load_state_dict(saved["train_state"])
        if "sampler" in wants:
            self.sampler.resume(Position(*saved["sampler"]))
        self.last_saved = state.step if wants == ALL else -1
        streams = {name.rsplit("/", 1)[1]: t.slices[(0,)] for name, t in tensors.items() if name.startswith("rng/")}
        if streams:
            self.streams.load_state_dict(streams)


def _known_to_any_rank(tensors: Logical) -> set[str]:
    """Names of what this rank wants, or, of a pipeline, another stage."""
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, list(tensors))
    return {name for rank in names for name in rank}


@contextmanager
def _failing_together() -> Iterator[None]:
    """What any rank finds within the block is raised on all, so that nobody waits for one that has given up."""
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
    """A new folder; what an unfinished save left there is removed, the mark of a complete one first."""
    (target / storage.COMMIT_FILE).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)


def _whole(value: Tensor) -> LogicalTensor:
    tensor = LogicalTensor(tuple(value.shape), value.dtype)
    tensor.add((0,) * value.dim(), value)
    return tensor


def _write(target: Path, tensors: dict[str, Any]) -> None:
    try:
        dcp.save(tensors, storage_writer=PlainWriter(target), planner=LogicalSavePlanner())
    except CheckpointException as error:
        problem = Problem(str(target), f"can't be written ({_causes(error)})", "Make room or choose another folder")
        raise CheckpointError(problem) from None


def _read(source: Path, reader: SafeReader, tensors: Logical) -> None:
    try:
        with torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=LogicalLoadPlanner())
    except CheckpointException as error:
        problem = Problem(str(source), f"can't be read ({_causes(error)})", "Choose an older one")
        raise CheckpointError(problem) from None


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())


def log_first(message: str) -> None:
    """Log on rank 0 alone."""
    if dist.get_rank() == 0:
        log.info(message)
