"""Scoreboard of injected faults: a line for each row of the table in ``doc/testing.md``, and how many were survived.

A test names the rows that it shows with ``@pytest.mark.fault("F3", …)``. Each test is one fault, unless it says by
``record_property("faults", n)`` that it injects more; ``record_property("corruptions", "149/150")`` adds how many
changes of files were detected. Of a test that fails no fault counts as survived.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "doc" / "testing.md"
ROW, FAULTS, CORRUPTIONS = "fault row", "faults", "corruptions"


def rows(page: Path = PAGE) -> dict[str, str]:
    """Return the faults of the table of ``page`` by their numbers."""
    return dict(re.findall(r"^\| (F\d+) \| ([^|]+) \|", page.read_text(), re.MULTILINE))


def note_rows(items: Iterable[pytest.Item]) -> None:
    """Attach to each test the rows that it names, and check that the page has them."""
    known = rows()
    for item in items:
        named = [row for mark in item.iter_markers("fault") for row in mark.args]
        if unknown := [row for row in named if row not in known]:
            raise pytest.UsageError(f"{item.nodeid}: {PAGE.name} has no row {unknown[0]!r}")
        item.user_properties += [(ROW, row) for row in named]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one test."""

    rows: tuple[str, ...]
    result: str  # passed, failed or skipped
    seconds: float
    faults: int
    detected: int = 0
    corruptions: int = 0

    @property
    def survived(self) -> int:
        """Number of faults that were survived."""
        return self.faults if self.result == "passed" else 0


def outcomes(reports: Iterable[pytest.TestReport]) -> list[Outcome]:
    """Join the reports of setup, call and teardown of each test that names a row."""
    by_test: dict[str, list[pytest.TestReport]] = {}
    for report in reports:
        by_test.setdefault(report.nodeid, []).append(report)
    return [_joined(parts) for parts in by_test.values() if _values(parts, ROW)]


def _joined(parts: Sequence[pytest.TestReport]) -> Outcome:
    result = next((part.outcome for word in ("failed", "skipped") for part in parts if part.outcome == word), "passed")
    detected, _, corruptions = (_values(parts, CORRUPTIONS) or ("0/0",))[0].partition("/")
    return Outcome(
        rows=_values(parts, ROW),
        result=result,
        seconds=sum(part.duration for part in parts),
        faults=int((_values(parts, FAULTS) or ("1",))[0]),
        detected=int(detected),
        corruptions=int(corruptions),
    )


def _values(parts: Iterable[pytest.TestReport], key: str) -> tuple[str, ...]:
    """Return the values of a property, in order, each once."""
    return tuple(dict.fromkeys(str(value) for part in parts for name, value in part.user_properties if name == key))


def board(page_rows: dict[str, str], found: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of the scoreboard; a fault without a test is not survived."""
    width = max(map(len, page_rows.values()))
    missing = 0
    for row, text in page_rows.items():
        own = [outcome for outcome in found if row in outcome.rows and outcome.result != "skipped"]
        missing += not own
        count = f"{sum(outcome.survived for outcome in own)}/{sum(outcome.faults for outcome in own)}"
        seconds = sum(outcome.seconds for outcome in own)
        yield f"{row:<4} {text:<{width}} {count if own else 'no test':>12} {seconds:6.0f} s"
    done = [outcome for outcome in found if outcome.result != "skipped"]
    survived, faults = sum(outcome.survived for outcome in done), sum(outcome.faults for outcome in done) + missing
    yield f"faults survived {survived}/{faults}"
    detected, corruptions = sum(outcome.detected for outcome in done), sum(outcome.corruptions for outcome in done)
    yield f"corruptions detected {detected}/{corruptions}"
