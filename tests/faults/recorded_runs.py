"""Runs whose calls to the file system are recorded, and runs that resume from what a crash would have left of them."""

from __future__ import annotations

import pickle
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.checkpoint.saver import Saver
from internlm.checkpoint.tensor_writer import memory_of
from internlm.core.trainer_builder import TrainerBuilder
from internlm.train import initialize_checkpoint_manager
from internlm.utils.errors import UserError
from tests.dist.whole_runs import build_run, recorded_warnings, saving
from tests.faults.disk import Call, Disk, Journal, Tree, calls_in, tree_of, watched, write_tree
from tests.harness.pool import run_ranks

BEGUN, PUBLISHED = "begun", "published"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Run that is recorded: with snapshots, and checkpoints of which one is kept."""

    ranks: int = 2
    overrides: tuple[str, ...] = ()
    again: int = 0
    """Number of further saves of the last step, each with other values."""

    def keys(self, folder: Path) -> list[str]:
        """Overrides of the run in ``folder``, which saves checkpoints at steps 2 and 4 and snapshots at 1 and 3."""
        kept = ("model.num_layers=1", "ckpt.keep_last=1", "ckpt.oss_snapshot_freq=1")
        return saving(folder, *kept, *self.overrides, total=4)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A save: when it was, and what."""

    name: str
    begun: int
    """Index of the first call that it may have made."""
    published: int
    """Number of calls that were made when it had been published."""
    manifest: bytes
    digests: tuple[str, ...]
    """Digest of each rank's tensors."""

    @property
    def step(self) -> int:
        return int(self.manifest.partition(b'"step":')[2].partition(b",")[0])


@dataclass(frozen=True)
class Recording:
    """Calls that all ranks of a run made, and its saves."""

    disk: Disk
    saves: tuple[Saved, ...]

    @property
    def calls(self) -> Sequence[Call]:
        return self.disk.calls

    def allowed(self, count: int) -> list[Saved]:
        """Return the saves that may be resumed after the first ``count`` calls: the last one and those in progress."""
        done = [save for save in self.saves if save.published <= count]
        return [*done[-1:], *(save for save in self.saves if save.begun <= count < save.published)]

    def must_hold_one(self, count: int) -> bool:
        """Return whether some save was published within the first ``count`` calls."""
        return any(save.published <= count for save in self.saves)


def record(scenario: Scenario, folder: Path) -> Recording:
    """Train, and record what happens in the save folder."""
    root, file = folder / "ckpts", folder / "journal"
    root.mkdir(parents=True)
    digests = run_ranks(scenario.ranks, _record, scenario, folder, file)
    calls = calls_in(file)
    disk = Disk(calls)
    # Were a call missing in the journal, the crashes before and after it would be, too.
    assert disk.after(len(calls)) == tree_of(root)
    return Recording(disk, tuple(_saves(calls, digests)))


def _saves(calls: Sequence[Call], digests: Sequence[Sequence[str]]) -> Iterator[Saved]:
    notes = [(index, call) for index, call in enumerate(calls) if call.kind == "note"]
    begun = [(index, call.path) for index, call in notes if call.target == BEGUN]
    published = [(index, call) for index, call in notes if call.target == PUBLISHED]
    for (start, name), (end, call), of_ranks in zip(begun, published, zip(*digests, strict=True), strict=True):
        assert call.path == name
        yield Saved(name=name, begun=start, published=end, manifest=call.data, digests=of_ranks)


def _record(rank: int, world_size: int, scenario: Scenario, folder: Path, file: Path) -> list[str]:
    builder = build_run(world_size, tuple(scenario.keys(folder)), [])
    journal = Journal(file)
    with watched(folder / "ckpts", journal), _noted_saves(journal) as digests, recorded_warnings():
        builder.fit()
        for _ in range(scenario.again):
            _scramble(builder, 2.0)
            builder.checkpoints.save(builder.trainer.state)
        builder.checkpoints.close()
    journal.close()
    return digests


@contextmanager
def _noted_saves(journal: Journal) -> Iterator[list[str]]:
    """Note when saves begin and are published, and collect the digests of what this rank saves."""
    save, publish = Saver.save, LocalStorage.publish
    digests: list[str] = []

    def noted_save(self: Saver, what: Any, tensors: LogicalTensors, background: bool = False) -> None:
        digests.append(digest(tensors))
        if dist.get_rank() == 0:
            journal.note(what.checkpoint, BEGUN)
        save(self, what, tensors, background)

    def noted_publish(self: LocalStorage, checkpoint: str, attempt: str, manifest: bytes, *check: Any) -> None:
        publish(self, checkpoint, attempt, manifest, *check)
        journal(Call("note", checkpoint, PUBLISHED, manifest), lambda: None)

    Saver.save, LocalStorage.publish = noted_save, noted_publish  # type: ignore[method-assign]
    try:
        yield digests
    finally:
        Saver.save, LocalStorage.publish = save, publish  # type: ignore[method-assign]


def digest(tensors: LogicalTensors) -> str:
    """Return a digest of the slices of this rank, with their names and places."""
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        for offsets, values in sorted(tensor.slices.items()):
            hasher.update(f"{name} {offsets} {values.dtype}".encode())
            hasher.update(memory_of(values.detach().contiguous()))
    return hasher.hexdigest()


def _scramble(builder: TrainerBuilder, factor: float) -> None:
    """Change all values of the model and the optimizer."""
    with torch.no_grad():
        for tensor in builder.checkpoints.content.tensors().values():
            for values in tensor.slices.values():
                if values.is_floating_point():
                    values.mul_(factor).add_(1)


# -- resuming


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a rank has after it resumed."""

    message: str
    warnings: list[str]
    step: int
    digest: str
    names: list[str]
    """Content of the save folder."""
    memory: int
    """Largest memory of the process so far, in bytes."""


def resume_each(scenario: Scenario, folder: Path, trees: Sequence[Tree], timeout: float) -> list[tuple[Resumed, ...]]:
    """Resume from each tree as the save folder of the run in ``folder``; return the results of all ranks."""
    file = folder / "trees"
    with file.open("wb") as stream:
        for tree in trees:
            pickle.dump(tree, stream)
    ranks = run_ranks(scenario.ranks, _resume_each, scenario, folder, file, timeout=timeout)
    return list(zip(*ranks, strict=True))


def _resume_each(rank: int, world_size: int, scenario: Scenario, folder: Path, file: Path) -> list[Resumed]:
    builder = build_run(world_size, tuple(scenario.keys(folder)), [])
    root, state = folder / "ckpts", builder.trainer.state
    start = state.state_dict()
    results = []
    with file.open("rb") as stream:
        while stream.peek(1):
            tree: Tree = pickle.load(stream)
            if rank == 0:
                shutil.rmtree(root, ignore_errors=True)
                root.mkdir()
                write_tree(tree, root)
            _scramble(builder, 3.0)
            state.load_state_dict(start)
            builder.checkpoints = initialize_checkpoint_manager(
                builder.trainer.model, builder.trainer.optimizer, builder.train_dl
            )
            dist.barrier()
            results.append(_resume(builder, root))
            builder.checkpoints.close()
            dist.barrier()
    return results


def _resume(builder: TrainerBuilder, root: Path) -> Resumed:
    with recorded_warnings() as warnings:
        try:
            message = builder.checkpoints.try_resume_training(builder.trainer.state)
        except UserError as error:
            message = f"error: {error}"
    return Resumed(
        message=message,
        warnings=warnings,
        step=builder.trainer.state.step,
        digest=digest(builder.checkpoints.content.tensors()),
        names=LocalStorage(root).names(),
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    )
