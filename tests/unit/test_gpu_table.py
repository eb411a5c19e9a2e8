"""The table that ``make test-gpu`` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import gpu_table
from tests.harness.gpu_table import Outcome

ROOT = Path(__file__).parents[2]


def _outcome(name: str, *rows: str, result: str = "passed", seconds: float = 1.0, **more: object) -> Outcome:
    return Outcome(name=name, rows=rows, result=result, seconds=seconds, **more)  # type: ignore[arg-type]


def test_a_line_joins_the_tests_of_a_row() -> None:
    found = [
        _outcome("test_a", "kernels", seconds=1.25),
        _outcome("test_a", "kernels", result="skipped", reason="no package"),
        _outcome("test_b", "kernels", "speed", result="failed", figures=("7 tokens/s",)),
    ]
    assert list(gpu_table.table(["kernels", "speed", "rest"], found)[2:]) == [
        "| kernels | `test_a` × 2, `test_b` | 1 failed, 1 passed, 1 skipped (no package) | 3.2 | 7 tokens/s |",
        "| speed | `test_b` | failed | 1.0 | 7 tokens/s |",
        "| rest | no test | – | 0.0 |  |",
    ]


def test_the_rows_are_those_of_the_first_table_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n| what | where |\n|---|---|\n| a `b` | c |\n| d, e | f |\n\n| other | g |\n|---|---|\n")
    assert gpu_table.rows(page) == ["a `b`", "d, e"]


@pytest.mark.wide
def test_without_a_gpu_every_row_of_the_page_has_tests_that_are_skipped_with_the_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    environment = {**os.environ, "INTERNLM_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert lines[0][0] == "what"
    assert [cells[0] for cells in lines[2:]] == gpu_table.rows()
    assert {cells[2] for cells in lines[2:]} == {"skipped (no CUDA device: INTERNLM_DEVICE is 'cpu')"}
    assert gpu_table.NO_TEST not in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]


def test_a_test_may_name_only_rows_of_the_page(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.gpu("teleportation"))
    with pytest.raises(pytest.UsageError, match=r"gpu.md has no row 'teleportation'"):
        gpu_table.note_rows([request.node])
