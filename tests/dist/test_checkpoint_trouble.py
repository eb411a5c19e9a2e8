"""Checkpoints that are unfinished, damaged, of another run, or can't be written."""

from __future__ import annotations

import functools
import json
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm.checkpoint.tensor_files import SafeReader
from internlm.core.trainer import Hook, Trainer
from tests.dist.whole_runs import Outcome, assert_goes_on, assert_same_tensors, fit, resume, saving


def _unfinished(newest: Path) -> None:
    (newest / "COMMITTED").unlink()


def _only_begun(newest: Path) -> None:
    for name in ("COMMITTED", "state.json", ".metadata"):
        (newest / name).unlink()


def _empty(newest: Path) -> None:
    shutil.rmtree(newest)
    newest.mkdir()


@pytest.mark.parametrize("damage", [_unfinished, _only_begun, _empty])
def test_an_unfinished_checkpoint_is_ignored(damage: Callable[[Path], None], saved: Outcome, tmp_path: Path) -> None:
    fit(2, saving(tmp_path), 4)
    root = tmp_path / "ckpts"
    damage(root / "step-4")
    (root / "step-9").write_text("a file")
    (root / "step-5.old").mkdir()
    loaded = resume(2, saving(tmp_path))
    assert loaded.ranks[0].warnings == [f"ignored unfinished checkpoint step-4 in {root}"]
    assert not loaded.ranks[1].warnings
    assert_goes_on(loaded, saved)


def test_an_unfinished_checkpoint_is_saved_again(saved: Outcome, tmp_path: Path) -> None:
    _unfinished(tmp_path / "ckpts" / "step-2")
    (tmp_path / "ckpts" / "step-2" / "left over").write_text("")
    again = fit(2, saving(tmp_path), 2)
    assert_same_tensors(again.tensors, saved.tensors)
    assert "left over" not in os.listdir(tmp_path / "ckpts" / "step-2")
    assert resume(2, saving(tmp_path)).state["step"] == 2


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
        ("model_type=LLAMA2", "model_type: 'LLAMA2', but {} was saved with 'INTERNLM2'. Use the config of the"),
        ("model.vocab_size=80", "model.vocab_size: 80, but {} was saved with 64"),
        ("model.dtype=torch.float32", "model.dtype: 'torch.float32', but {} was saved with 'torch.float64'"),
        ("optimizer.type=Lion", "{}: optimizer/exp_avg_sq: saved for 'embedding.weight' and "),
        ("data.micro_bsz=1", "data.micro_bsz: 1, but {} was saved with 2"),
        ("data.fixed_random_dataset_seqlen=True", "data.train_folder: the data changed after {} was saved"),
    ]
    for override, expected in rows:
        message = _assert_refused(tmp_path, override)
        assert expected.format(source) in message


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


def test_another_weight_decay_is_no_other_architecture(saved: Outcome, tmp_path: Path) -> None:
    """It sorts the parameters into other groups, of which logical tensors are independent."""
    loaded = resume(2, saving(tmp_path, "adam.decay_norm_and_bias=False"))
    assert_same_tensors(loaded.tensors, saved.tensors)
    assert loaded.ranks[0].steps == [2, 2]


@pytest.mark.usefixtures("saved")
def test_a_missing_tensor_is_known_to_all_ranks(tmp_path: Path) -> None:
    """Even though its owner is the only rank that asks for it."""
    index = tmp_path / "ckpts" / "step-2" / ".metadata"
    metadata = SafeReader(index.parent).read_metadata()
    del metadata.state_dict_metadata["optimizer/exp_avg/output.weight"]
    index.write_bytes(pickle.dumps(metadata))
    assert "step-2: optimizer/exp_avg/output.weight: is missing. To load only the weights" in _assert_refused(tmp_path)


def _rewrite_state(newest: Path, **changes: object) -> None:
    file = newest / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(name: str, part: float) -> Callable[[Path], None]:
    def damage(newest: Path) -> None:
        os.truncate(newest / name, int((newest / name).stat().st_size * part))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda newest: (newest / ".metadata").unlink(), ".metadata: cannot be read"),
    "half an index": (_cut(".metadata", 0.5), ".metadata: cannot be read"),
    "half a shard": (_cut("__0_0.distcp", 0.5), "bytes according to .metadata, got"),
    "nearly a shard": (_cut("__1_0.distcp", 0.99), "bytes according to .metadata, got"),
    "an empty shard": (_cut("__1_0.distcp", 0), "__1_0.distcp: expected at least "),
    "no shard": (lambda newest: (newest / "__1_0.distcp").unlink(), "__1_0.distcp: expected at least "),
    "half a state": (_cut("state.json", 0.5), "state.json: cannot be read"),
    "no state": (lambda newest: (newest / "state.json").unlink(), "step-2: unfinished: state.json is missing"),
    "a newer format": (
        lambda newest: _rewrite_state(newest, format=7),
        "step-2/state.json: expected a format version of at most 1, got 7. Update InternEvo",
    ),
}


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_before_anything_changes(damage: str, tmp_path: Path) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(tmp_path / "ckpts" / "step-2")
    assert expected in _assert_refused(tmp_path)


class _Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.file),))


@pytest.mark.usefixtures("saved")
def test_nothing_that_lies_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    (tmp_path / "ckpts" / "step-2" / ".metadata").write_bytes(pickle.dumps(_Hostile(target)))
    assert "cannot be read (refused a reference to posix.mkdir" in _assert_refused(tmp_path)
    assert not target.exists()


def test_a_wrong_path_lists_what_is_there(tmp_path: Path) -> None:
    fit(1, saving(tmp_path), 2)
    path = f"ckpt.load_ckpt_info.path={tmp_path / 'ckpts' / 'step-3'}"
    message = resume(2, saving(tmp_path / "new", path)).message
    start = f"{tmp_path}/ckpts/step-3: no such checkpoint ({tmp_path}/ckpts has step-2). "
    assert message == f"{start}Pass the path of an existing step-N folder"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ckpts").write_text("a file")
    outcome = fit(2, saving(tmp_path), 2)
    assert "File exists" in outcome.message
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
    assert f"{tmp_path}/ckpts/step-4: cannot be written (rank {rank}: " in failed.message
    assert os.listdir(tmp_path / "ckpts") == ["step-2"]
    assert resume(2, saving(tmp_path)).state["step"] == 2


def test_another_runs_folder_is_warned_of(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, total=2))
    warnings = fit(1, saving(tmp_path, "ckpt.auto_resume=False", total=2)).ranks[0].warnings
    assert len(warnings) == 1
    assert "contains step-2 of an earlier run, which is not resumed" in warnings[0]


def test_wrong_values_of_the_state_change_nothing(saved: Outcome, tmp_path: Path) -> None:
    """All are listed."""
    step_2 = tmp_path / "ckpts" / "step-2"
    _rewrite_state(step_2, train_state={**saved.state, "step": -3}, sampler=[], seed="24")
    problems = _assert_refused(tmp_path).splitlines()
    assert [problem.removeprefix(f"{step_2}/state.json: ") for problem in problems] == [
        "train_state.step: must be at least 0, got -3. Choose another checkpoint",
        "sampler: expected 3 numbers, got []. Choose another checkpoint",
        "seed: expected an integer, got '24'. Choose another checkpoint",
    ]
