"""A published training loop runs as it is, and trains as train.py does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.jobs import metrics, records, script_on_pool, train_on_pool

LOOP, CONFIG = "tests/integration/scripts/published_loop.py", "tests/integration/scripts/published_config.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_published_loop_trains_as_train_py_does(ranks: int, tmp_path: Path) -> None:
    by_loop, by_train = tmp_path / "loop", tmp_path / "train"
    by_loop.mkdir()
    by_train.mkdir()
    saving = ("ckpt.enable_save_ckpt=True", "ckpt.checkpoint_every=2")
    loop = script_on_pool(LOOP, ranks, CONFIG, by_loop, *saving)
    assert loop.returncode == 0, loop.stderr
    job = train_on_pool(ranks, CONFIG, by_train, *saving)
    assert job.returncode == 0, job.stderr
    (record,) = records(by_train)
    logged = [(line["loss"], line["lr"], line["lr"]) for line in metrics(record)]
    assert len(logged) == 3
    for rank in range(ranks):
        lines = (by_loop / f"losses-{rank}").read_text().splitlines()
        assert [tuple(map(float, line.split())) for line in lines] == [pytest.approx(row, rel=1e-6) for row in logged]
    # The loop counts too: its assignments are ignored, with a warning each.
    for step in ("step-2", "step-3"):
        counts, expected = (_train_state(folder / "ckpts" / step) for folder in (by_loop, by_train))
        assert counts == expected
    assert counts == {"step": 3, "num_consumed_tokens": 3 * ranks * 2 * 32, "inf_nan_skip_batches": 0}
    for name, value in (("step_count", 2), ("num_consumed_tokens", 2 * ranks * 2 * 32)):
        message = f"train_state.{name}: ignored the assignment of {value}, since the trainer counts. Remove the line"
        assert loop.stderr.count(message) == 1, loop.stderr
        assert loop.stderr.count(f"train_state.{name}: ") == 1, loop.stderr
    assert loop.stderr.count("train_state.num_consumed_samples_in_epoch: this counter of the script is not saved") == 1
    assert "batch_count" not in loop.stderr  # the loop sets it to the number that it has


def _train_state(checkpoint: Path) -> dict[str, int]:
    state: dict[str, int] = json.loads((checkpoint / "state.json").read_text())["train_state"]
    return state


def test_a_loop_that_fails_sends_one_alert(tmp_path: Path) -> None:
    """To the file that the config names; the process groups are left by the interpreter's end, not by the decorator."""
    with pytest.raises(Exception, match="a bug"):
        script_on_pool(LOOP, 2, CONFIG, tmp_path, options=("--user_arg", "1"))
    text = (tmp_path / "alerts" / "small.log").read_text()
    assert text.count("[small] failed:\nTraceback (most recent call last):") == 1
    assert text.endswith("RuntimeError: a bug\n\n")


def test_a_users_mistake_in_a_decorated_script_is_one_line(tmp_path: Path) -> None:
    job = script_on_pool(LOOP, 1, "configs/no_such_file.py", tmp_path)
    assert job.returncode == 2
    assert "configs/no_such_file.py: no such file" in job.stderr
    assert len(job.stderr.splitlines()) == 1
