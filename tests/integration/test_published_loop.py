"""A published training loop runs as it is, and trains as train.py does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.jobs import metrics, records, script_on_pool, train_on_pool

LOOP, CONFIG = "tests/integration/scripts/published_loop.py", "tests/integration/scripts/published_config.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_published_loop_trains_as_train_py_does(ranks: int, tmp_path: Path) -> None:
    job = script_on_pool(LOOP, ranks, CONFIG, tmp_path)
    assert job.returncode == 0, job.stderr
    job = train_on_pool(ranks, CONFIG, tmp_path)
    assert job.returncode == 0, job.stderr
    (record,) = records(tmp_path)
    logged = [(line["loss"], line["lr"], line["lr"]) for line in metrics(record)]
    assert len(logged) == 3
    for rank in range(ranks):
        lines = (tmp_path / f"losses-{rank}").read_text().splitlines()
        assert [tuple(map(float, line.split())) for line in lines] == [pytest.approx(row, rel=1e-6) for row in logged]


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
