"""Schedules in CSV files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import make_table, read_table, write_table
from internlm.core.scheduler.validate import ScheduleError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.csv"


@pytest.mark.parametrize(
    ("schedule", "size"),
    [("gpipe", (2, 1, 3)), ("1f1b", (3, 1, 5)), ("interleaved", (2, 3, 5)), ("zbh1", (4, 1, 2)), ("zbv", (3, 2, 4))],
)
def test_a_written_table_is_read_back(schedule: str, size: tuple[int, int, int], path: Path) -> None:
    table = make_table(schedule, *size)
    write_table(table, path)
    read = read_table(path, *size)
    assert read == replace(table, schedule="own.csv")


def test_the_file_is_what_people_write(path: Path) -> None:
    write_table(make_table("1f1b", 2, 1, 3), path)
    assert path.read_text() == "# 1f1b: stages 2, chunks 1, micro-batches 3\nF0,F1,B0,F2,B1,B2\nF0,B0,F1,B1,F2,B2\n"


TOLERATED = """\ufeff# a note, with a comma
"# a note, as a spreadsheet keeps it",,
v,,

 f0 , "f0.1",, b0.1,b0,
,,,
F0,F0.1,B0.1,b0
"""


def test_blanks_case_quotes_and_notes_do_no_harm(path: Path) -> None:
    path.write_text(TOLERATED, encoding="utf-8", newline="\r\n")
    table = read_table(path, 2, 2, 1)
    assert table.stage_layout == StageLayout(2, 2, v_shaped=True)
    assert [" ".join(map(str, row)) for row in table.actions] == ["F0 F0.1 B0.1 B0"] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "# note\nF0,B0\nF0,X0,F1.,B0;B1\n",
            [
                "{}:3, cell 2: 'X0' is not an action. Write F, B or W",
                "{}:3, cell 3: 'F1.' is not an action. Write F, B or W",
                "{}:3, cell 4: 'B0;B1' is not an action. Write F, B or W",
            ],
        ),
        ("F0,B0\nV\nF0,B0\n", ["{}:2, cell 1: 'V' is not an action."]),
        ("F0,B0\n", ["{}, ranks 0 to 1: expected 2 rows of actions, one per rank, got 1. Write"]),
        ("", ["{}, ranks 0 to 1: expected 2 rows of actions, one per rank, got 0. Write"]),
        ("F0,B0\nF0,F1\n", ["{}, rank 1: has F1, but the schedule has only", "{}, rank 1: lacks B0."]),
        ("F0,B0\nB0,F0\n", ["{}, rank 1: has B0 before F0. Put F0 first"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, said: list[str], path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ScheduleError) as error:
        read_table(path, 2, 1, 1)
    lines = str(error.value).splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start.format(path)) for line, start in zip(lines, said, strict=True))


def test_a_deadlock_is_named_with_the_file(path: Path) -> None:
    path.write_text("F0,B0,F1,B1\nF0,F1,B0,B1\n")
    with pytest.raises(ScheduleError, match=r"own.csv, ranks 0, 1: deadlock: rank 0 blocks at"):
        read_table(path, 2, 1, 2)


def test_files_that_cannot_be_read_or_written(path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"own.csv: cannot be read \(No such file"):
        read_table(path, 2, 1, 2)
    with pytest.raises(ScheduleError, match=r"x.csv: cannot be written \(No such file"):
        write_table(make_table("1f1b", 1, 1, 1), path / "x.csv")
    path.write_bytes(b"F0,\xff")
    with pytest.raises(ScheduleError, match=r"own.csv: is not UTF-8 text"):
        read_table(path, 2, 1, 2)
