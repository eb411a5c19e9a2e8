"""Rules of the architecture that no linter knows."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PURE = ("model", "ops", "core/parallel", "core/scheduler", "solver", "data")


def test_no_setting_hides_in_the_environment() -> None:
    files = [path for folder in PURE for path in (ROOT / "internlm" / folder).rglob("*.py")]
    assert files
    assert not [path for path in files if "environ" in path.read_text()]


def test_train_script_is_short() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40
