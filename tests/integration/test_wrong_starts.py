"""A user's mistake is logged once, in words, with exit code 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness.launch import Job
from tests.integration.jobs import train, train_on_pool
from tests.unit.data.files import write_bin

DEBUG = "configs/debug/internlm2.py"

#: Overrides, options, message.
ROWS: dict[str, tuple[Sequence[str], Sequence[str], str]] = {
    "a key": (["model.hiden_size=64"], (), "--set model.hiden_size: unknown key. Did you mean 'model.hidden_size'?"),
    "a flag": ((), ["--profile"], "--profile: unknown argument. Did you mean '--profiling'?"),
    "a folder": (["data.train_folder=nowhere"], (), "nowhere: no such folder. Set data.train_folder to "),
}


@pytest.mark.parametrize("mistake", ROWS)
def test_a_mistake(mistake: str, tmp_path: Path) -> None:
    overrides, options, message = ROWS[mistake]
    job = train_on_pool(2, DEBUG, tmp_path, *overrides, options=options)
    assert job.returncode == 2
    _assert_logged_once(job, message)


def test_a_config_file_that_fails(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("data = dict(\n    total_steps=1 / 0,\n)\n")
    job = train_on_pool(2, file, tmp_path)
    assert job.returncode == 2
    _assert_logged_once(job, f"{file}:2: ZeroDivisionError: division by zero. ")


@pytest.mark.wide
def test_a_bad_sample_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """Only the rank that reads it can log what is wrong. torchrun names its exit code, and leaves nothing behind."""
    write_bin(tmp_path / "data" / "en" / "a.bin", [[1, 2, 3, 4]] * 300 + [[1, 999, 3, 4]] + [[5, 6, 7, 8]] * 300)
    job = train(2, DEBUG, tmp_path, f"data.train_folder={tmp_path / 'data'}")
    assert job.stderr.count("a.bin:301 (sample 300, byte ") == 1, job.stderr
    assert "contains token 999, but model.vocab_size is 256. Tokenize the texts with the tokenizer" in job.stderr
    assert "/internlm/" not in job.stderr, job.stderr  # no traceback, of the rank that lost its peer either
    assert "exitcode  : 2 " in job.stderr
    assert (job.returncode, job.left_behind) == (1, 0)


def _assert_logged_once(job: Job, message: str) -> None:
    assert job.stderr.count(message) == 1, job.stderr
    assert "/internlm/" not in job.stderr  # no traceback of ours
    assert job.left_behind == 0
