"""The folder of a run's records."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm.core import trainer_builder


def test_runs_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_builder.time, "strftime", lambda _: "Nov22_10-00-00")
    folders = [trainer_builder._claim(tmp_path / "job") for _ in range(3)]
    assert [folder.name for folder in folders] == ["Nov22_10-00-00", "Nov22_10-00-00_1", "Nov22_10-00-00_2"]
    assert all(folder.is_dir() for folder in folders)
