"""Whole runs on workers of the pool, as a user's script starts them, with their state at the end.

A *log* here is what must be bitwise equal where two runs are the same run: losses, gradient norms, and random numbers
drawn before each step.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.logical_tensors import LogicalTensors, model_tensors, optimizer_tensors
from internlm.checkpoint.manifest import Manifest, parse_manifest
from internlm.checkpoint.run_state import RunState
from internlm.checkpoint.saver import THREAD
from internlm.checkpoint.tensor_writer import Save
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.data.batch_plan import START, Position
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.optimizer.update_rules import AdamW
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger
from internlm.verify.record import ShardsByName, TensorShards
from internlm.verify.tensors import assemble
from tests.dist.tiny import TINY, share_of_batch
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.samples import run_state

#: Steps whose samples are compared, from the current one on.
SAMPLES_OF = 2

Entry = tuple[int, float, float, float, float]


@dataclass(kw_only=True)
class Rank:
    """State of one rank at the end."""

    log: list[Entry] = field(default_factory=list)
    """Step, loss, gradient norm, and a random number from torch's own and from the tensor stream."""
    state: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Counters of the optimizer and its loss scale."""
    steps: list[int] = field(default_factory=list)
    """Updates that Adam counts, by group."""
    tensors: ShardsByName = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    samples: list[Tensor] = field(default_factory=list)
    """Rows of the next steps."""
    position: Position = START
    """Data position of the current step."""
    message: str = ""
    """Message of resuming, or the error that ended the run."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """State of all ranks, with the tensors and samples of the whole job."""

    ranks: list[Rank]
    tensors: dict[str, Tensor]
    samples: list[Tensor]

    @property
    def log(self) -> list[Entry]:
        """The log of rank 0."""
        return self.ranks[0].log

    @property
    def state(self) -> dict[str, Any]:
        """The trainer state, which is the same on every rank."""
        assert all(rank.state == self.ranks[0].state for rank in self.ranks)
        return self.ranks[0].state

    @property
    def message(self) -> str:
        """The message, which is the same on every rank."""
        assert len({rank.message for rank in self.ranks}) == 1, [rank.message for rank in self.ranks]
        return self.ranks[0].message


def fit(
    world_size: int,
    overrides: Sequence[str],
    stop_after: int | None = None,
    hooks: Sequence[Hook] = (),
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Train :data:`TINY` with ``overrides`` to its end, or to step ``stop_after``, where it ends as if killed."""
    args = tuple(overrides), stop_after, tuple(hooks)
    return _gathered(run_ranks(world_size, _in_environment, environment or {}, _fit, *args))


def saving(folder: Path, *more: str, every: int = 2, total: int = 6) -> list[str]:
    """Overrides of a run that keeps its log and its checkpoints (``folder / "ckpts"``) in ``folder``."""
    return [
        f"data.total_steps={total}",
        f"log_folder={folder / 'logs'}",
        "ckpt.enable_save_ckpt=True",
        f"ckpt.checkpoint_every={every}",
        f"ckpt.save_ckpt_folder=local:{folder / 'ckpts'}",
        *more,
    ]


def resume(world_size: int, overrides: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Load the checkpoint that such a run would resume, without a step. An error on loading is the message."""
    return _gathered(run_ranks(world_size, _in_environment, environment or {}, _resume, tuple(overrides)))


def resave(world_size: int, overrides: Sequence[str]) -> Outcome:
    """Load as :func:`resume` does, and save at once what was loaded."""
    return _gathered(run_ranks(world_size, _resave, tuple(overrides)))


def _gathered(ranks: list[Rank]) -> Outcome:
    samples = [torch.cat(rows) for rows in zip(*(rank.samples for rank in ranks), strict=True)]
    return Outcome(ranks, whole_tensors(rank.tensors for rank in ranks), samples)


def shards_of(tensors: LogicalTensors) -> ShardsByName:
    """Copy a rank's slices of logical tensors, so that they can travel to the test."""
    return {
        name: TensorShards(
            tuple(tensor.global_shape), {at: box.to(tensor.dtype, copy=True) for at, box in tensor.slices.items()}
        )
        for name, tensor in tensors.items()
    }


def whole_tensors(ranks: Iterable[ShardsByName]) -> dict[str, Tensor]:
    """Assemble logical tensors from the shards of all ranks; what several ranks store must be bitwise equal."""
    found = assemble(list(ranks))
    assert (found.disagreements, found.holes) == ([], [])
    return found.tensors


def assert_goes_on(loaded: Outcome, saved: Outcome) -> None:
    """Assert that a loaded run has the state and the next samples of the saved one, in whatever layout."""
    assert_same_tensors(loaded.tensors, saved.tensors)
    assert (loaded.state, loaded.ranks[0].steps) == (saved.state, saved.ranks[0].steps)
    assert all(map(torch.equal, loaded.samples, saved.samples))


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Assert equal names, and values that are bitwise equal."""
    assert one.keys() == other.keys()
    assert not [name for name, tensor in other.items() if not torch.equal(one[name], tensor)]


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the committed checkpoints."""
    return sorted(path.name for path in folder.glob("step-*") if path.suffix == "")


def manifest_in(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint."""
    return parse_manifest((folder / "manifest.json").read_bytes(), folder.name)


def save_of(step: int) -> Save:
    """Return what names the checkpoint of a step."""
    return Save(checkpoint=f"step-{step}", step=step, state=RunState(**{**run_state(step), "format": 2}))


# -- on the workers


class _Texts(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collect the framework's warnings within the block, and print none of them."""
    texts: list[str] = []
    logger = get_logger()
    outer, logger.handlers = logger.handlers, [_Texts(texts)]
    try:
        yield texts
    finally:
        logger.handlers = outer


def wait_for_saves() -> None:
    """Wait for what this process saves in the background: a later run in the same process would find it unfinished."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


class KilledError(Exception):
    """Ends a run on every rank, without anything being saved."""


class _Log(Hook):
    def __init__(self, log: list[Entry], stop_after: int | None) -> None:
        self.log, self.stop_after = log, stop_after
        self.draws = (0.0, 0.0)

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.stop_after:
            wait_for_saves()
            raise KilledError
        with gpc.random_streams.use(ParallelMode.TENSOR):
            from_tensor_stream = torch.rand(()).item()
        self.draws = (torch.rand(()).item(), from_tensor_stream)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        report.read()
        self.log.append((report.step, report.result.loss, report.update.grad_norm, *self.draws))


def _in_environment(
    rank: int, world_size: int, environment: Mapping[str, str], run: Callable[..., Rank], *args: Any
) -> Rank:
    os.environ.update(environment)  # until the next call, which starts clean
    return run(rank, world_size, *args)


def _fit(
    rank: int, world_size: int, overrides: tuple[str, ...], stop_after: int | None, hooks: tuple[Hook, ...]
) -> Rank:
    log: list[Entry] = []
    take_signals()
    builder = build_run(world_size, overrides, [*hooks, _Log(log, stop_after)])
    return finish_run(builder, builder.fit, log)


def _resume(rank: int, world_size: int, overrides: tuple[str, ...]) -> Rank:
    builder = build_run(world_size, overrides, [])

    def load() -> str:
        with builder.checkpoints:  # leaves the save folder to the next run
            return builder.checkpoints.try_resume_training(builder.trainer.state)

    return finish_run(builder, load, [])


def _resave(rank: int, world_size: int, overrides: tuple[str, ...]) -> Rank:
    builder = build_run(world_size, overrides, [])

    def load_and_save() -> str:
        with builder.checkpoints:
            message = builder.checkpoints.try_resume_training(builder.trainer.state)
            builder.checkpoints.save(builder.trainer.state)
            return message

    return finish_run(builder, load_and_save, [])


def take_signals() -> None:
    """Give back the signals that the pool ignores, or that a run which was stopped has left ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def build_run(world_size: int, overrides: tuple[str, ...], hooks: Sequence[Hook]) -> TrainerBuilder:
    """Build a run of :data:`TINY` on this rank."""
    initialize_distributed_env(TINY, overrides=(share_of_batch(world_size, overrides), *overrides))
    model = create_model()
    loader, types = build_train_loader_with_data_type()
    val_dls = build_valid_loader_with_data_type()
    return TrainerBuilder(model, loader, val_dls, dataset_types=types, extra_hooks=hooks)


def _updates(optimizer: HybridZeroOptimizer) -> list[int]:
    """Return the updates that torch's AdamW counts, by tensor."""
    rules = [rule for rule in optimizer.rules if isinstance(rule, AdamW)]
    return [int(state["step"]) for rule in rules for state in rule.fused.state.values()]


def finish_run(builder: TrainerBuilder, action: Callable[[], object], log: list[Entry]) -> Rank:
    """Call ``action``, which trains or loads, and describe this rank's state after it."""
    with recorded_warnings() as warnings:
        try:
            message = action()
        except UserError as error:
            message = error
        except KilledError:
            message = "killed"
        except SystemExit as error:
            message = f"exit {error.code}"
    trainer, loader = builder.trainer, builder.train_dl
    trainer.optimizer.gather_parameters()  # of a run that was broken off
    step, optimizer = trainer.state.step, trainer.optimizer
    return Rank(
        log=log,
        state=trainer.state.state_dict(),
        optimizer=optimizer.state_dict(),
        steps=_updates(optimizer),
        tensors=shards_of({**model_tensors(trainer.model), **optimizer_tensors(optimizer)}),
        streams=gpc.random_streams.state_dict(),
        samples=[loader.read(index)[0]["input_ids"] for index in range(step, step + SAMPLES_OF)],
        position=loader.position(step),
        message=str(message),
        warnings=warnings,
    )
