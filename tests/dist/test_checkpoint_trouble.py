"""Checkpoints that are unfinished, damaged, of another run, or can't be written."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.manifest import Manifest
from internlm.core.trainer import Hook, Trainer
from internlm.utils.errors import CheckpointError
from tests.dist.whole_runs import Outcome, assert_goes_on, assert_same_tensors, build_run, fit, resume, saving
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.samples import rewrite_manifest, rewrite_state


def _visible(root: Path) -> list[str]:
    """Return the names in a save folder, but for the file by which runs lock it."""
    return sorted(name for name in os.listdir(root) if not name.startswith("."))


def _not_published(newest: Path) -> None:
    newest.rename(newest.with_name("step-4.tmp-ab12"))


def _only_begun(newest: Path) -> None:
    _not_published(newest)
    (newest.with_name("step-4.tmp-ab12") / "manifest.json").unlink()


def _empty(newest: Path) -> None:
    shutil.rmtree(newest)
    newest.mkdir()


def _half_deleted(newest: Path) -> None:
    newest.rename(newest.with_name("step-4.deleting-ab12"))


@pytest.mark.parametrize("damage", [_not_published, _only_begun, _empty, _half_deleted])
def test_an_unfinished_checkpoint_is_ignored(damage: Callable[[Path], None], saved: Outcome, tmp_path: Path) -> None:
    fit(2, saving(tmp_path), 4)
    root = tmp_path / "ckpts"
    damage(root / "step-4")
    (root / "step-5.old").mkdir()
    loaded = resume(2, saving(tmp_path))
    assert loaded.ranks[0].warnings == [f"ignored unfinished checkpoint step-4 in {root}"]
    assert not loaded.ranks[1].warnings
    assert_goes_on(loaded, saved)
    assert not list(root.glob("step-4.*"))


def test_what_a_new_save_was_about_to_replace_is_loaded(saved: Outcome, tmp_path: Path) -> None:
    """Of the two renames by which a checkpoint replaces another, only the first was done."""
    root = tmp_path / "ckpts"
    (root / "step-2").rename(root / "step-2.replaced-ab12")
    loaded = resume(2, saving(tmp_path))
    assert loaded.message == f"resumed from {root}/step-2 at step 2"
    assert_goes_on(loaded, saved)
    assert _visible(root) == ["step-2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with a checkpoint of step 2, and the run that saved it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(2, saving(folder), 2)


@pytest.fixture
def saved(whole: tuple[Path, Outcome], tmp_path: Path) -> Outcome:
    """The run that saved the checkpoint of step 2 in ``tmp_path``, a copy."""
    folder, run = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return run


@pytest.mark.usefixtures("saved")
def test_other_configs_are_refused(tmp_path: Path) -> None:
    """The message names what differs, and nothing is loaded."""
    source = tmp_path / "ckpts" / "step-2"
    rows = [
        ("model.hidden_size=64", "model.hidden_size: 64, but {} was saved with 32. Use the config of the checkpoint"),
        (
            "model_type=INTERNLM",
            "model.qkv_bias: True, but {} was saved with False",
        ),
        ("model.vocab_size=80", "model.vocab_size: 80, but {} was saved with 64"),
        (
            "model.rope_base=500.",
            "model.rope_base: 500.0, but {} was saved with 10000.0; this changes what the model computes",
        ),
        ("model.dtype=torch.float32", "model.dtype: 'torch.float32', but {} was saved with 'torch.float64'"),
        ("optimizer.type=Lion", "{}: optimizer/exp_avg_sq: saved for 'embedding.weight' and "),
        ("data.micro_bsz=1", "data.micro_bsz: 1, but {} was saved with 2"),
        (
            "data.fixed_random_dataset_seqlen=True",
            "data.fixed_random_dataset_seqlen: True, but {} was saved with False",
        ),
    ]
    for override, expected in rows:
        message = _assert_refused(tmp_path, override)
        assert expected.format(source) in message
        assert "the data changed" not in message  # random data, which follow from the settings


def test_checkpoints_of_older_versions_are_not_taken_for_an_empty_folder(tmp_path: Path) -> None:
    """Unless the run is not to resume, or has checkpoints of its own."""
    root = tmp_path / "ckpts"
    for step in (1, 2, 3):
        (root / str(step)).mkdir(parents=True)
        (root / str(step) / "model_tp0_pp0.pt").write_text("")
    assert resume(2, saving(tmp_path)).message == (
        f"{root}: holds no checkpoint of this version to resume from, but checkpoints in the format of older versions "
        "of InternEvo (the newest: 3/, step 3). Choose another ckpt.save_ckpt_folder, or set ckpt.auto_resume=False "
        "to start a new run in this one"
    )
    fit(2, saving(tmp_path, "ckpt.auto_resume=False"), 2)
    assert resume(2, saving(tmp_path)).message == f"resumed from {root}/step-2 at step 2"


@functools.cache
def _fresh(*overrides: str) -> Outcome:
    """A run that has nothing to resume."""
    with tempfile.TemporaryDirectory() as folder:
        return resume(2, saving(Path(folder), *overrides))


def _assert_refused(folder: Path, *overrides: str) -> str:
    refused, fresh = resume(2, saving(folder, *overrides)), _fresh(*overrides)
    assert_same_tensors(refused.tensors, fresh.tensors)
    assert refused.state == fresh.state
    assert all(map(torch.equal, refused.samples, fresh.samples))
    return refused.message


def test_another_model_and_another_schedule_are_logged_where_they_are_allowed(saved: Outcome, tmp_path: Path) -> None:
    allowed = "ckpt.allow_model_changes=True", "model.rope_base=500."
    loaded = resume(2, saving(tmp_path, *allowed, "adam.lr=0.1"))
    assert_same_tensors(loaded.tensors, saved.tensors)
    jump = "the learning rate jumps from 0.00933 to 0.075 at step 2, because of another adam.lr"
    assert [rank.warnings for rank in loaded.ranks] == [[jump], []]


def test_another_weight_decay_is_no_other_architecture(saved: Outcome, tmp_path: Path) -> None:
    """It sorts the parameters into other groups, of which logical tensors are independent."""
    loaded = resume(2, saving(tmp_path, "adam.decay_norm_and_bias=False"))
    assert_same_tensors(loaded.tensors, saved.tensors)
    assert loaded.ranks[0].steps == [2, 2]


@pytest.mark.usefixtures("saved")
def test_a_missing_tensor_is_known_to_all_ranks(tmp_path: Path) -> None:
    """Even though its owner is the only rank that asks for it."""
    name = "optimizer/exp_avg/output.weight"

    def change(manifest: Manifest) -> dict[str, Any]:
        others = {other: record for other, record in manifest.tensors.items() if other != name}
        return {"tensors": {**others, "optimizer/exp_avg/other": manifest.tensors[name]}}

    rewrite_manifest(tmp_path / "ckpts" / "step-2", change)
    assert f"step-2: {name}: is missing. To load only the weights" in _assert_refused(tmp_path)


def _cut(name: str, part: float) -> Callable[[Path], None]:
    def damage(newest: Path) -> None:
        os.truncate(newest / name, int((newest / name).stat().st_size * part))

    return damage


def _flip(name: str, part: float) -> Callable[[Path], None]:
    def damage(newest: Path) -> None:
        content = bytearray((newest / name).read_bytes())
        content[int(len(content) * part)] ^= 4
        (newest / name).write_bytes(content)

    return damage


def _from_another_step(name: str) -> Callable[[Path], None]:
    """Replace a file by that of another step of the same run, which has the same size."""

    def damage(newest: Path) -> None:
        shutil.copy(newest.parents[1] / "other" / "ckpts" / "step-4" / name, newest / name)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda newest: (newest / "manifest.json").unlink(), "step-2: manifest.json is missing. "),
    "half a manifest": (_cut("manifest.json", 0.5), "step-2/manifest.json: expected the checksum "),
    "an empty manifest": (_cut("manifest.json", 0), "manifest.json: expected a first line with a checksum"),
    "another manifest": (_from_another_step("manifest.json"), "is the manifest of step-4, not of step-2"),
    "half a shard": (_cut("rank-00000.bin", 0.5), " bytes, manifest says "),
    "nearly a shard": (_cut("rank-00001.bin", 0.99), " bytes, manifest says "),
    "an empty shard": (_cut("rank-00001.bin", 0), "rank-00001.bin: 0 bytes, manifest says "),
    "no shard": (lambda newest: (newest / "rank-00001.bin").unlink(), "rank-00001.bin: is missing. "),
    "a bit of a shard": (_flip("rank-00001.bin", 0.3), " differ from those that were saved"),
    "another shard": (_from_another_step("rank-00000.bin"), " differ from those that were saved"),
    "half a state": (_cut("state.json", 0.5), "state.json: "),
    "no state": (lambda newest: (newest / "state.json").unlink(), "state.json: "),
    "a bit of the state": (_flip("state.json", 0.5), "state.json: differs from the file that was saved"),
    "another state": (_from_another_step("state.json"), "state.json: "),
}


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 2 and 4 of the same run."""
    folder = tmp_path_factory.mktemp("later")
    fit(2, saving(folder), 4)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_loaded(
    damage: str, saved: Outcome, later: Path, tmp_path: Path
) -> None:
    """Also if a part of the damaged checkpoint has been read already; without another one, the run ends."""
    shutil.copytree(later, tmp_path / "other")
    root = tmp_path / "ckpts"
    (root / "step-2").rename(root / "step-1")
    rewrite_manifest(root / "step-1", lambda manifest: {"checkpoint": "step-1"})
    shutil.copytree(later / "ckpts" / "step-2", root / "step-2")
    spoil, expected = DAMAGES[damage]
    spoil(root / "step-2")
    loaded = resume(2, saving(tmp_path))
    assert loaded.message == f"resumed from {root}/step-1 at step 2 (step-2 did not verify)"
    assert len(loaded.ranks[0].warnings) == 1
    assert expected in loaded.ranks[0].warnings[0]
    assert_same_tensors(loaded.tensors, saved.tensors)


@pytest.mark.usefixtures("saved")
def test_a_run_whose_checkpoints_all_fail_ends(tmp_path: Path) -> None:
    root = tmp_path / "ckpts"
    _flip("rank-00001.bin", 0.3)(root / "step-2")
    shutil.copytree(root / "step-2", root / "step-1")
    rewrite_manifest(root / "step-1", lambda manifest: {"checkpoint": "step-1"})
    source = f"ckpt.load_ckpt_info.path={root / 'step-2'}"
    found = resume(2, saving(tmp_path, source))
    # Each damage is printed once.
    (warning,) = found.ranks[0].warnings
    assert warning.startswith(f"step-2 does not verify: {root}/step-2/rank-00001.bin: ")
    damage, end = found.message.splitlines()
    assert damage.startswith(f"{root}/step-1/rank-00001.bin: ")
    assert "differ from those that were saved" in damage
    assert end.startswith(f"{root}: none of its checkpoints verifies. ")
    # Of a checkpoint that was asked for, there is no other one.
    assert "differ from those" in resume(2, saving(tmp_path / "new", source)).message


@pytest.mark.usefixtures("saved")
def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    step_2 = tmp_path / "ckpts" / "step-2"
    rewrite_manifest(step_2, lambda manifest: {"format": 7})
    expected = f"{step_2}: expected a format version of at most 2, got 7. Update InternEvo"
    assert _assert_refused(tmp_path) == expected


def test_a_wrong_path_lists_what_is_there(tmp_path: Path) -> None:
    fit(1, saving(tmp_path), 2)
    path = f"ckpt.load_ckpt_info.path={tmp_path / 'ckpts' / 'step-3'}"
    message = resume(2, saving(tmp_path / "new", path)).message
    start = f"{tmp_path}/ckpts/step-3: no such checkpoint ({tmp_path}/ckpts has step-2). "
    assert message == f"{start}Pass the path of an existing step-N folder"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ckpts").write_text("a file")
    outcome = fit(2, saving(tmp_path), 2)
    assert outcome.message.startswith(f"{tmp_path}/ckpts: exists, and is not a folder")
    assert outcome.log == []  # found before anything was trained in vain
    assert outcome.message.endswith("Choose a writable folder with free space")


class _NoRoom(Hook):
    """From the second save on, files on one rank can't grow, as on a full disk."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def before_step(self, trainer: Trainer) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.step == 2 and os.environ["RANK"] == str(self.rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    def after_run(self, trainer: Trainer) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))


@pytest.mark.parametrize("rank", [0, 1])
def test_no_room_on_one_rank(rank: int, tmp_path: Path) -> None:
    """All ranks fail together; the partial checkpoint is removed, the one before is whole."""
    failed = fit(2, saving(tmp_path), hooks=[_NoRoom(rank)])
    assert f"{tmp_path}/ckpts/step-4: cannot be saved (rank {rank}: " in failed.message
    assert _visible(tmp_path / "ckpts") == ["step-2"]
    assert resume(2, saving(tmp_path)).state["step"] == 2


def _resume_without_space(rank: int, world_size: int, overrides: list[str]) -> str:
    """Return the message of resuming where the disk is full, or the error."""
    builder = build_run(world_size, tuple(overrides), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "free_bytes", lambda self: 0)
        try:
            with builder.checkpoints:
                return builder.checkpoints.try_resume_training(builder.trainer.state)
        except CheckpointError as error:
            return str(error)


def test_a_finished_run_needs_no_space_and_one_that_goes_on_does(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, total=2))
    (message,) = run_ranks(1, _resume_without_space, saving(tmp_path, total=2))
    assert message == f"resumed from {tmp_path}/ckpts/step-2 at step 2"
    (message,) = run_ranks(1, _resume_without_space, saving(tmp_path, total=4))
    assert message.startswith("No space: need ")


def test_another_runs_folder_is_warned_of(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, total=2))
    warnings = fit(1, saving(tmp_path, "ckpt.auto_resume=False", total=2)).ranks[0].warnings
    assert len(warnings) == 1
    assert "contains step-2 of an earlier run, which is not resumed" in warnings[0]


@pytest.mark.usefixtures("saved")
def test_wrong_values_of_the_state_change_nothing(tmp_path: Path) -> None:
    """All are listed, also if the checksums are right."""
    step_2 = tmp_path / "ckpts" / "step-2"
    state = json.loads((step_2 / "state.json").read_text())
    state["train_state"]["step"] = -3
    text = json.dumps({**state, "sampler": [], "seed": "24"}).encode()
    rewrite_state(step_2, text)
    *problems, _ = _assert_refused(tmp_path).splitlines()
    assert [problem.removeprefix(f"{step_2}/state.json: ") for problem in problems] == [
        "train_state.step: must be at least 0, got -3. Choose another checkpoint",
        "sampler: expected 3 numbers, got []. Choose another checkpoint",
        "seed: expected an integer, got '24'. Choose another checkpoint",
    ]
