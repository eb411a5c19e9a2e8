"""The folder of a run's records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from internlm.core import trainer_builder


def test_runs_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_builder.time, "strftime", lambda _: "2026-11-22T10-00-00")
    folders = [trainer_builder._claim(tmp_path / "job") for _ in range(3)]
    assert [folder.name for folder in folders] == [f"2026-11-22T10-00-00{suffix}" for suffix in ("", "_1", "_2")]
    assert all(folder.is_dir() for folder in folders)


def test_names_sort_by_time(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", trainer_builder._claim(tmp_path).name)


def test_a_resumed_run_goes_on_in_its_folder_unless_that_is_gone_or_another_one_is_asked_for(tmp_path: Path) -> None:
    job, other = tmp_path / "job", tmp_path / "other"
    first = trainer_builder._choose(job, None)
    assert trainer_builder._choose(job, str(first)) == first
    assert trainer_builder._choose(other, str(first)).parent == other
    first.rmdir()
    again = trainer_builder._choose(job, str(first))
    assert again.is_dir()
    assert again.parent == job
