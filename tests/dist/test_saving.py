"""What a save writes, how it is spread over ranks, and what it deletes."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.local_files import LocalSource
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.manifest import Manifest
from internlm.checkpoint.saver import Saver
from internlm.core.parallel.ledger import LEDGER
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.utils.errors import CheckpointError, Problem
from tests.dist.whole_runs import build_run, checkpoint_names, fit, manifest_in, save_of, saving
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.samples import damage

# -- pieces


def _bytes_of_ranks(manifest: Manifest) -> list[int]:
    return [manifest.files[f"rank-{rank:05}.bin"].size for rank in range(len(manifest.files) - 1)]


def _piece_bytes(manifest: Manifest) -> list[int]:
    return [tensor.piece_bytes(piece) for tensor in manifest.tensors.values() for piece in tensor.pieces]


def test_replicated_pieces_are_written_once_and_spread_over_the_replicas(tmp_path: Path) -> None:
    """Without ZeRO, three ranks hold everything but their random streams; each writes a third."""
    fit(3, saving(tmp_path, "parallel.zero1.size=1"), 2)
    manifest = manifest_in(tmp_path / "ckpts" / "step-2")
    whole = [tensor for name, tensor in manifest.tensors.items() if not name.startswith("rng/")]
    assert all(len(tensor.pieces) == 1 for tensor in whole)
    sizes, pieces = _bytes_of_ranks(manifest), _piece_bytes(manifest)
    assert len(sizes) == 3
    assert sum(sizes) == sum(pieces)
    assert max(sizes) - min(sizes) <= max(pieces)
    assert sum(sizes) / 3 > 3 * max(pieces)  # else the line above says nothing


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_each_rank_writes_its_own_shards_as_rectangles(fully_sharded: bool, tmp_path: Path) -> None:
    """Of every tensor of the optimizer, exactly the slices that the rank holds; a flat shard has a few of each."""
    odd = ("model.vocab_size=67", "model.hidden_size=40", "model.multiple_of=1")
    run = fit(3, saving(tmp_path, f"parallel.zero1.fsdp={fully_sharded}", *odd), 2)
    manifest = manifest_in(tmp_path / "ckpts" / "step-2")
    largest = 0
    for rank, state in enumerate(run.ranks):
        for name, shards in state.tensors.items():
            if name.startswith("optimizer/"):
                written = {
                    piece.offsets: piece.sizes
                    for piece in manifest.tensors[name].pieces
                    if piece.file == f"rank-{rank:05}.bin"
                }
                assert written == {at: tuple(box.shape) for at, box in shards.slices.items()}
                assert len(written) <= 2 * len(shards.shape) - 1
                largest = max(largest, len(written))
    assert largest > 1


_OBJECTS = ("gather_object", "all_gather_object", "scatter_object_list", "broadcast_object_list")


class _MeasureExchange(Hook):
    """Writes the largest object that ranks exchange in a save, and the collectives of tensors, to a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def before_run(self, trainer: Trainer) -> None:
        self.largest, self.originals = 0, {name: getattr(dist, name) for name in _OBJECTS}
        for name, original in self.originals.items():
            setattr(dist, name, self._measured(original))

    def _measured(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            self.largest = max(self.largest, len(pickle.dumps(args[:2])))
            return original(*args, **keywords)

        return call

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        # Extra hooks come before the one that saves.
        self.before_save = LEDGER.snapshot()

    def after_run(self, trainer: Trainer) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)
        traffic = len(LEDGER.since(self.before_save))
        Path(f"{self.file}-{dist.get_rank()}").write_text(json.dumps([self.largest, traffic]))


def test_no_tensor_is_gathered(tmp_path: Path) -> None:
    """Ranks exchange where pieces are, which is small; the largest tensor has megabytes."""
    fit(2, saving(tmp_path, "model.vocab_size=8192", total=1), hooks=[_MeasureExchange(str(tmp_path / "measured"))])
    assert max(_bytes_of_ranks(manifest_in(tmp_path / "ckpts" / "step-1"))) > 4_000_000
    for rank in range(2):
        largest, traffic = json.loads((tmp_path / f"measured-{rank}").read_text())
        assert 0 < largest < 100_000
        assert traffic == 0


# -- memory


def _rss(field: str) -> int:
    """Return a figure of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _extra_bytes(action: Callable[[], object]) -> int:
    """Return by how much the memory of this process grows during ``action``."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _rss("VmRSS")
    action()
    return _rss("VmHWM") - before


#: Size of the state whose saves are measured, in bytes.
STATE_BYTES = 200 << 20


def _measure_memory(rank: int, world_size: int, folder: str) -> tuple[int, int, list[str]]:
    saver = Saver(LocalStorage(folder), lambda: None, lambda step: (), lambda: None, Exchange())
    values = torch.ones(STATE_BYTES // 8).view(1024, -1)
    # Pieces of a transposed tensor are not contiguous.
    tensors = {"a": LogicalTensor.whole(values), "b": LogicalTensor.whole(torch.ones(values.t().shape).t())}
    at_once = _extra_bytes(lambda: saver.save(save_of(1), tensors))

    def in_background() -> None:
        saver.save(save_of(2), tensors, background=True)
        saver.wait()

    later = _extra_bytes(in_background)
    return at_once, later, [str(problem) for step in (1, 2) for problem in damage(saver.storage, f"step-{step}")]


@pytest.mark.wide
def test_a_save_copies_the_state_only_for_the_background(tmp_path: Path) -> None:
    """At most 64 MB; in the background, as many bytes as the rank writes, and 64 MB."""
    ((at_once, later, problems),) = run_ranks(1, _measure_memory, str(tmp_path))
    assert at_once < 64 << 20
    assert STATE_BYTES // 2 < later < STATE_BYTES + (64 << 20)
    assert problems == []


# -- retention


def test_a_run_keeps_the_newest_checkpoints_and_multiples(tmp_path: Path) -> None:
    fit(2, saving(tmp_path, "ckpt.keep_last=2", "ckpt.keep_every=3", every=1))
    assert checkpoint_names(tmp_path / "ckpts") == ["step-3", "step-5", "step-6"]


class _FlipABit(Hook):
    """Flips a bit of the checkpoint of step 4 as soon as it is committed; nothing is deleted after this save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before_run(self, trainer: Trainer) -> None:
        self.publish = LocalStorage.publish
        LocalStorage.publish = self._publish_damaged  # type: ignore[assignment, method-assign]

    @property
    def _publish_damaged(self) -> Callable[..., None]:
        def publish(storage: LocalStorage, checkpoint: str, *args: Any) -> None:
            self.publish(storage, checkpoint, *args)
            if checkpoint == "step-4":
                file = self.folder / checkpoint / "rank-00001.bin"
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 4
                file.write_bytes(content)

        return publish

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 4:
            assert checkpoint_names(self.folder) == ["step-2", "step-4"]

    def after_run(self, trainer: Trainer) -> None:
        LocalStorage.publish = self.publish  # type: ignore[method-assign]


def test_no_checkpoint_is_deleted_before_the_new_one_was_read_back(tmp_path: Path) -> None:
    root = tmp_path / "ckpts"
    run = fit(2, saving(tmp_path, "ckpt.keep_last=1"), hooks=[_FlipABit(root)])
    (warning,) = run.ranks[0].warnings
    assert warning.startswith(f"step-4 does not verify, so older checkpoints are kept: {root}/step-4/rank-00001.bin: ")
    assert checkpoint_names(root) == ["step-6"]


def _save_until_lost(rank: int, world_size: int, folder: str) -> list[str]:
    """Save twice, where the second save finds after its commit that the folder has another owner."""
    checks = iter([False, False, True])

    def check_owner() -> None:
        if next(checks):
            raise CheckpointError(Problem(folder, "another run took it over"))

    def older(step: int) -> list[str]:
        return [f"step-{step - 1}"] if step > 1 else []

    saver = Saver(LocalStorage(folder), check_owner, older, lambda: None, Exchange())
    for step in (1, 2):
        saver.save(save_of(step), {"a": LogicalTensor.whole(torch.ones(9))})
    return checkpoint_names(Path(folder))


def test_nothing_is_deleted_after_the_folder_got_another_owner(tmp_path: Path) -> None:
    """Reading back takes long enough to lose the folder in the meantime."""
    assert run_ranks(1, _save_until_lost, str(tmp_path)) == [["step-1", "step-2"]]


class _Recording(LocalStorage):
    """Storage that records what is read, and damages a file of the second checkpoint when it is published."""

    def __init__(self, folder: str, damaged: str, out_of_reach: str) -> None:
        super().__init__(folder)
        self.damaged, self.out_of_reach, self.read_files = damaged, out_of_reach, list[str]()

    def open(self, name: str) -> LocalSource:
        self.read_files.append(name)
        if name == self.out_of_reach:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path(name))
        return super().open(name)

    def publish(self, checkpoint: str, attempt: str, manifest: bytes, check: Callable[[], None] | None = None) -> None:
        super().publish(checkpoint, attempt, manifest, check)
        if self.damaged and checkpoint == "step-2":
            path = self.root / checkpoint / self.damaged
            path.write_bytes(path.read_bytes()[:-2] + b"?\n")


def _save_two(
    rank: int, world_size: int, folder: str, damaged: str = "", out_of_reach: str = ""
) -> tuple[list[str], list[str]]:
    """Keep the last of two checkpoints; return what this rank has read, and the checkpoints that are left."""

    def older(step: int) -> list[str]:
        return ["step-1"] if step == 2 else []

    storage = _Recording(folder, damaged, out_of_reach)
    saver = Saver(storage, lambda: None, older, lambda: None, Exchange())
    for step in (1, 2):
        saver.save(save_of(step), {f"{name}/{rank}": LogicalTensor.whole(torch.ones(9)) for name in "ab"})
    dist.barrier()
    return storage.read_files, checkpoint_names(Path(folder))


def test_each_rank_reads_back_what_it_wrote_and_no_list_of_all_pieces(tmp_path: Path) -> None:
    """The manifest of many ranks is large; rank 0 compares its bytes with those that it wrote."""
    (first, left), (second, _) = run_ranks(2, _save_two, str(tmp_path))
    assert first == [f"step-2/{name}" for name in ("rank-00000.bin", "state.json", "manifest.json")]
    assert second == ["step-2/rank-00001.bin"]
    assert left == ["step-2"]


@pytest.mark.parametrize("damaged", ["state.json", "manifest.json"])
def test_no_checkpoint_is_deleted_if_a_file_without_tensors_is_damaged(damaged: str, tmp_path: Path) -> None:
    ((_, left),) = run_ranks(1, _save_two, str(tmp_path), damaged)
    assert left == ["step-1", "step-2"]


def test_a_file_that_is_out_of_reach_for_reading_back_ends_no_run_and_keeps_older_checkpoints(tmp_path: Path) -> None:
    """On one rank, after the commit; the others go on, too."""
    (_, left), (read, _) = run_ranks(2, _save_two, str(tmp_path), "", "step-2/rank-00001.bin")
    assert read == ["step-2/rank-00001.bin"]
    assert left == ["step-1", "step-2"]


# -- exchange between ranks


def _groups_of_a_run(rank: int, world_size: int, overrides: list[str]) -> tuple[set[str], bool]:
    """Save and load beside NCCL; return the collectives over the default group, and whether one was not called."""
    used, called = set[str](), list[str]()

    def measured(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, group: dist.ProcessGroup | None = None, **keywords: Any) -> Any:
            called.append(name)
            if group in (None, dist.group.WORLD):
                used.add(name)
            return original(*args, group=group, **keywords)

        return call

    manager = (builder := build_run(world_size, tuple(overrides), [])).checkpoints
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group=None: "nccl")
        for name in _OBJECTS:
            patch.setattr(dist, name, measured(name, getattr(dist, name)))
        with manager:
            builder.trainer.state.step = 1
            manager.save(builder.trainer.state)
            manager.try_resume_training(builder.trainer.state)
    return used, bool({*_OBJECTS} - {*called})


def test_beside_nccl_all_objects_go_through_host_memory(tmp_path: Path) -> None:
    """Saving, checking the folder, and loading; NCCL would need a copy of each object on the device."""
    for found in run_ranks(2, _groups_of_a_run, saving(tmp_path)):
        assert found == (set(), False)
