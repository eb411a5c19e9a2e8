"""The model of doc/new_model.md trains and is verified by the commands of the page, as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.jobs import ROOT

PAGE = (ROOT / "doc" / "new_model.md").read_text()
MODEL, CONFIG, HF_CONFIG = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
(COMMANDS,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.S | re.M)
TRAIN, *VERIFY = COMMANDS.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "my_config.py").write_text(CONFIG)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.replace(" train.py ", f" {ROOT / 'train.py'} ").split()
    path = Path(sys.executable).with_name(program)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [path, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=180, check=False
    )


def test_the_page_is_short() -> None:
    assert len((MODEL + CONFIG).splitlines()) <= 60


@pytest.mark.wide
def test_a_module_of_hugging_face_trains(folder: Path) -> None:
    (folder / "hf_config.py").write_text(HF_CONFIG)
    done = run(TRAIN.replace("my_config", "hf_config").partition(" --set")[0], folder)
    assert done.returncode == 0, done.stderr
    assert "step=19" in done.stderr


def test_it_trains(folder: Path) -> None:
    done = run(TRAIN, folder)
    assert done.returncode == 0, done.stderr
    assert "step=19" in done.stderr


@pytest.mark.parametrize("command", [VERIFY[0], *(pytest.param(line, marks=pytest.mark.wide) for line in VERIFY[1:])])
def test_it_is_verified(command: str, folder: Path) -> None:
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("PASS")


def test_a_mistake_is_named(folder: Path) -> None:
    """Under msp a rank has some tokens of the sequence, so that their mean is another one."""
    wrong = MODEL.replace("return x + self.down(", "return x - x.mean(0) + self.down(")
    assert wrong != MODEL
    (folder / "my_model.py").write_text(wrong)
    done = run(VERIFY[0], folder)
    assert done.returncode == 1, done.stderr
    assert "layers.0" in next(line for line in done.stdout.splitlines() if line.startswith("modules forward"))
