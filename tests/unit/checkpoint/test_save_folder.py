"""The save folder, and the human-readable state of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm.checkpoint import save_folder
from internlm.checkpoint.save_folder import COMMIT_FILE, STATE_FILE, read_state
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.samples import complete, run_state


def problem_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("location", "expected"),
    [("local:ckpts/7b", "ckpts/7b"), ("/data/ckpts", "/data/ckpts"), ("local:/data", "/data"), ("~/a", "HOME/a")],
)
def test_locations(location: str, expected: str) -> None:
    assert str(save_folder.local_path(location)) == expected.replace("HOME", str(Path.home()))


def test_steps_come_newest_first_by_number(tmp_path: Path) -> None:
    for name in ("step-9", "step-100", "step-20", "step-x", "step-", "logs", "my-step-3", "step-5.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").write_text("a file")
    steps = list(save_folder.steps_in(tmp_path))
    assert steps == [(number, save_folder.step_folder(tmp_path, number)) for number in (100, 20, 9)]


def test_a_save_folder_that_is_not_there_has_no_steps(tmp_path: Path) -> None:
    assert list(save_folder.steps_in(tmp_path / "none")) == []


def test_a_checkpoint_is_complete_once_its_mark_is_there(tmp_path: Path) -> None:
    assert not save_folder.is_complete(tmp_path)
    assert save_folder.is_complete(complete(tmp_path))


def test_a_durable_file_is_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / STATE_FILE
    path.write_text("old")
    save_folder.write_durably(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(STATE_FILE, "new")]


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(complete(tmp_path / "step-3")).model_dump() == run_state(3)


def test_a_state_of_another_step_is_refused(tmp_path: Path) -> None:
    """Somebody has copied it from another checkpoint."""
    complete(tmp_path / "step-3", json.dumps(run_state(4)))
    assert problem_of(tmp_path / "step-3") == (
        f"{tmp_path}/step-3/state.json: train_state.step: expected 3, as the folder is named, got 4. "
        "Choose another checkpoint"
    )


def test_a_folder_that_was_renamed_is_read(tmp_path: Path) -> None:
    assert read_state(complete(tmp_path / "best")).train_state.step == 3


def test_not_there_says_what_is(tmp_path: Path) -> None:
    complete(tmp_path / "step-20")
    complete(tmp_path / "step-9")
    missing = tmp_path / "step-10"
    todo = "Pass the path of an existing step-N folder"
    assert problem_of(missing) == f"{missing}: no such checkpoint ({tmp_path} has step-20, step-9). {todo}"
    nowhere = tmp_path / "none" / "step-1"
    assert problem_of(nowhere) == f"{nowhere}: no such checkpoint ({nowhere.parent} has no checkpoint). {todo}"


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    assert problem_of(tmp_path).startswith(f"{tmp_path}: not a checkpoint: it has no {STATE_FILE}. ")


@pytest.mark.parametrize("left", [".metadata", "__0_0.distcp"])
def test_a_save_that_was_cut_off_before_its_state(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("")
    assert problem_of(tmp_path).startswith(f"{tmp_path}: unfinished: {STATE_FILE} is missing. ")


def test_a_save_that_was_cut_off_before_its_mark(tmp_path: Path) -> None:
    (complete(tmp_path) / COMMIT_FILE).unlink()
    what = "unfinished: the commit mark COMMITTED is missing"
    assert problem_of(tmp_path) == f"{tmp_path}: {what}. Choose an older checkpoint"


def test_a_damaged_state(tmp_path: Path) -> None:
    complete(tmp_path, '{"format": 1, "train_st')
    assert problem_of(tmp_path).startswith(f"{tmp_path / STATE_FILE}: cannot be read (")


def test_of_a_large_file_only_the_start_is_read(tmp_path: Path) -> None:
    with (complete(tmp_path) / STATE_FILE).open("wb") as file:
        file.truncate(1 << 40)
    assert problem_of(tmp_path).startswith(f"{tmp_path / STATE_FILE}: cannot be read (larger than 4194304 bytes). ")
