"""Table of what a run on a GPU has shown: a line for each row of the table in ``doc/gpu.md``.

A test names the rows that it shows with ``@pytest.mark.gpu("row", …)``, and adds measurements by
``record_property("figures", …)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "doc" / "gpu.md"
ROW, FIGURES = "gpu row", "figures"
NO_TEST = "no test"


def rows(page: Path = PAGE) -> list[str]:
    """Return the first cell of each row of the first table of ``page``."""
    lines = page.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    table = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        table.append(line.split("|")[1].strip())
    return table


def note_rows(items: Iterable[pytest.Item]) -> None:
    """Attach to each test the rows that it names, and check that the page has them."""
    known = {*rows()}
    for item in items:
        named = [row for mark in item.iter_markers("gpu") for row in mark.args]
        if unknown := [row for row in named if row not in known]:
            raise pytest.UsageError(f"{item.nodeid}: {PAGE.name} has no row {unknown[0]!r}")
        item.user_properties += [(ROW, row) for row in named]


def on_cpu_and_gpu(*named: str) -> pytest.MarkDecorator:
    """Run a test with ``device`` ``"cpu"``, and with ``"cuda"`` for the rows with these names."""
    return pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(*named))])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one test."""

    name: str
    rows: tuple[str, ...]
    result: str  # passed, failed or skipped
    seconds: float
    reason: str = ""
    figures: tuple[str, ...] = ()


def outcomes(reports: Iterable[pytest.TestReport]) -> list[Outcome]:
    """Join the reports of setup, call and teardown of each test that names a row."""
    by_test: dict[str, list[pytest.TestReport]] = {}
    for report in reports:
        by_test.setdefault(report.nodeid, []).append(report)
    return [_joined(nodeid, parts) for nodeid, parts in by_test.items() if _values(parts, ROW)]


def _joined(nodeid: str, parts: list[pytest.TestReport]) -> Outcome:
    worst = next((part for result in ("failed", "skipped") for part in parts if part.outcome == result), parts[0])
    skip = worst.longrepr[2] if isinstance(worst.longrepr, tuple) else ""
    return Outcome(
        name=nodeid.partition("::")[2].partition("[")[0],
        rows=_values(parts, ROW),
        result=worst.outcome,
        seconds=sum(part.duration for part in parts),
        reason=str(skip).removeprefix("Skipped: "),
        figures=_values(parts, FIGURES),
    )


def _values(parts: list[pytest.TestReport], key: str) -> tuple[str, ...]:
    """Return the values of a property, in order, each once."""
    return tuple(dict.fromkeys(str(value) for part in parts for name, value in part.user_properties if name == key))


def table(page_rows: Iterable[str], found: Sequence[Outcome]) -> list[str]:
    """Format the outcomes as lines of Markdown: the rows of the page, with results and the sum of seconds of each.

    A test that names several rows counts in each of them.
    """
    lines = ["| what | tests | result | s | figures |", "|---|---|---|--:|---|"]
    for row in page_rows:
        own = [outcome for outcome in found if row in outcome.rows]
        names = ", ".join(f"`{name}`" + f" × {n}" * (n > 1) for name, n in Counter(o.name for o in own).items())
        figures = "; ".join(figure for outcome in own for figure in outcome.figures)
        seconds = sum(outcome.seconds for outcome in own)
        lines.append(f"| {row} | {names or NO_TEST} | {_result(own)} | {seconds:.1f} | {figures} |")
    return lines


def _result(own: list[Outcome]) -> str:
    """Format results: ``passed``, ``4 passed, 1 skipped (reason)``."""
    counts = Counter(outcome.result for outcome in own)
    reasons = "; ".join(dict.fromkeys(outcome.reason for outcome in own if outcome.reason))
    parts = []
    for result in ("failed", "passed", "skipped"):
        if counts[result]:
            count = f"{counts[result]} " if len(counts) > 1 else ""
            parts.append(f"{count}{result}" + (f" ({reasons})" if result == "skipped" else ""))
    return ", ".join(parts) or "–"
