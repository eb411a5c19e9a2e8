"""The scoreboard that ``make faults`` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.scoreboard import CORRUPTIONS, FAULTS, MORE_TESTS, ROW, TESTS, board, outcomes, rows


def _report(name: str, when: str, outcome: str, **properties: object) -> pytest.TestReport:
    known = {"row": ROW, "faults": FAULTS, "corruptions": CORRUPTIONS}
    noted = [(known[key], value) for key, value in properties.items()]
    return pytest.TestReport(
        name,
        ("", 0, ""),
        {},
        outcome,
        None,
        when,
        user_properties=noted,
        duration=1,  # type: ignore[arg-type]
    )


def test_faults_are_counted_by_row_and_those_of_a_failed_test_are_not_survived() -> None:
    reports = [
        _report("a", "setup", "passed", row="F1"),
        _report("a", "call", "passed", row="F1", faults=20, corruptions="19/20"),
        _report("b", "call", "failed", row="F1", faults=5, corruptions="1/5"),
        _report("c", "call", "passed", row="F2"),
        _report("d", "call", "skipped", row="F2"),
        _report("e", "call", "passed"),
    ]
    assert list(board({"F1": "one", "F2": "two", "F3": "three"}, outcomes(reports))) == [
        "F1   one          20/25      3 s",
        "F2   two            1/1      1 s",
        "F3   three      no test      0 s",
        "faults survived 21/27",
        "corruptions detected 20/25",
    ]


def test_the_rows_are_those_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| fault | what |\n|---|---|\n| F1 | a kill | survived |\n| F12 | a flip | found |\n")
    assert rows(page) == {"F1": "a kill", "F12": "a flip"}
    assert MORE_TESTS.keys() <= rows().keys()


@pytest.mark.parametrize("row", MORE_TESTS)
def test_every_test_that_is_listed_exists(row: str) -> None:
    for file, names in MORE_TESTS[row].items():
        text = (TESTS / file).read_text()
        assert not [name for name in names if f"\ndef {name}" not in text]
