"""Plant mistakes in the parallel code, one at a time, and see whether the tests catch each, or what verify says of it.

Usage: ``python tools/mutate.py [--verify] [--write] [--only WORD ...]``. Works on a copy of the project in a temporary
folder. With ``--verify``, ``internlm verify`` is tried instead of the tests: it must name the module of the mistake.
With ``--write`` the outcome goes into ``doc/testing.md``, or with ``--verify`` into ``doc/verify.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file is in no package

from tools.mistakes import TESTED, Mistake
from tools.mistakes_around_layers import AROUND_LAYERS
from tools.mistakes_in_layers import IN_LAYERS

ROOT = Path(__file__).parents[1]
MISTAKES = TESTED
#: Mistakes of which ``internlm verify`` must name the module.
TO_NAME = (*(mistake for mistake in TESTED if mistake.verify), *IN_LAYERS, *AROUND_LAYERS)
PARTS = ("internlm", "tests", "pyproject.toml", "configs", "bench", "tools", "doc")
#: Seconds for ``internlm verify``; it takes no longer than 150 to find the smallest layout.
LIMIT = 240


@dataclass(frozen=True, kw_only=True)
class Page:
    """Page that shows the outcomes, between two markers."""

    path: Path
    marker: str
    heading: str

    def write(self, lines: Mapping[str, str], order: list[str]) -> None:
        """Replace the lines of the table by name; those of mistakes that were not tried now stay."""
        begin, end = f"<!-- {self.marker}: begin -->", f"<!-- {self.marker}: end -->"
        before, rest = self.path.read_text().split(begin)
        old, after = rest.split(end)
        known = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()} | dict(lines)
        table = "\n".join([self.heading, *(known[name] for name in order if name in known)])
        self.path.write_text(f"{before}{begin}\n{table}\n{end}{after}")


CAUGHT = Page(
    path=ROOT / "doc" / "testing.md",
    marker="mutations",
    heading="| mistake | planted in | caught first by |\n|---|---|---|",
)
PLANTED = Page(
    path=ROOT / "doc" / "verify.md",
    marker="planted",
    heading="| mistake | layout | culprit | what is wrong there |\n|---|---|---|---|",
)


def main() -> int:
    """Try all; 0 where all were caught, or all were named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verify", action="store_true", help="see whether internlm verify names the module of each")
    parser.add_argument("--write", action="store_true", help="write the outcome into the page")
    parser.add_argument("--only", nargs="+", default=[""], help="try those whose description contains one of these")
    args = parser.parse_args()
    known = TO_NAME if args.verify else MISTAKES
    chosen = [mistake for mistake in known if any(words in mistake.name for words in args.only)]
    with copy_of_project() as copy:
        if args.verify:
            named = {mistake: culprit_of(mistake, copy) for mistake in chosen}
            lines = {mistake.name: outcome.row(mistake) for mistake, outcome in named.items()}
            count = sum(outcome.is_named for outcome in named.values())
            explained = sum(outcome.verdict == "NAMED" for outcome in named.values())
            print(f"{count} of {len(named)} named at the right module, {explained} with the right explanation")
        else:
            if failed := _failing(sorted({mistake.tests for mistake in chosen}), copy):
                sys.exit(f"these fail without any mistake, so they can't catch one: {failed}")
            caught = {mistake: _caught_by(mistake, copy) for mistake in chosen}
            lines = {m.name: _row(m, test) for m, test in caught.items()}
            count = sum(map(bool, caught.values()))
    if args.write:
        (PLANTED if args.verify else CAUGHT).write(lines, [mistake.name for mistake in known])
    return 0 if count == len(chosen) else 1


@contextmanager
def copy_of_project() -> Iterator[Path]:
    """Copy what the tests and the command need to a temporary folder, and yield the copy."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy.mkdir()
        for part in PARTS:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        yield copy


@contextmanager
def _planted(mistake: Mistake, copy: Path) -> Iterator[None]:
    file = copy / "internlm" / mistake.file
    right = file.read_text()
    assert right.count(mistake.old) == 1, f"{mistake.name}: {right.count(mistake.old)} places in {mistake.file}"
    file.write_text(right.replace(mistake.old, mistake.new))
    try:
        yield
    finally:
        file.write_text(right)


def _environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy)}


# -- by the tests -----------------------------------------------------------------------------------------------------
def _run(tests: tuple[str, ...], copy: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=_environment(copy))


def _failing(selections: list[tuple[str, ...]], copy: Path) -> list[tuple[str, ...]]:
    return [tests for tests in selections if _run(tests, copy).returncode]


def _caught_by(mistake: Mistake, copy: Path) -> str:
    """Return the first test that failed; empty where none did."""
    with _planted(mistake, copy):
        run = _run(mistake.tests, copy)
    found = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\S.*?)(?: - .*)?$", run.stdout, re.M)
    caught = found[1] if found and run.returncode == 1 else ""
    print(f"{'caught' if caught else 'MISSED'}: {mistake.name} ({caught or run.stdout[-500:]})", flush=True)
    return caught


def _row(mistake: Mistake, caught: str) -> str:
    return f"| {mistake.name} | `{mistake.file}` | {f'`{caught}`' if caught else '**missed**'} |"


# -- by internlm verify -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What ``internlm verify`` said of a planted mistake."""

    verdict: str
    """``NAMED``, ``MISEXPLAINED`` (the right module, but not what is wrong there), ``MISNAMED``, ``NOT CAUGHT``, or
    ``FAILED``: no comparison was made."""
    found: str
    """Module and phase."""
    explanation: str
    seconds: float
    output: str
    """Last lines of the command."""

    @property
    def is_named(self) -> bool:
        return self.verdict in ("NAMED", "MISEXPLAINED")

    def row(self, mistake: Mistake) -> str:
        """Return the row of the table."""
        layout = ", ".join(each for each in mistake.verify if not each.startswith("world="))
        found = f"`{self.found}`" if self.is_named else f"**{self.found or self.verdict.lower()}**"
        return f"| {mistake.name} | {f'`{layout}`' if layout else '2 data ranks'} | {found} | {self.explanation} |"


def culprit_of(mistake: Mistake, copy: Path) -> Outcome:
    """Plant ``mistake`` in ``copy``, run ``internlm verify`` there, and print what it says."""
    report, start = copy / "report.json", time.monotonic()
    report.unlink(missing_ok=True)
    words = [mistake.config, "--debug-size", "--json", str(report), *mistake.arguments()]
    command = [sys.executable, "-m", "internlm", "verify", *words]
    with _planted(mistake, copy):
        try:
            run = subprocess.run(
                command, cwd=copy, capture_output=True, text=True, env=_environment(copy), timeout=LIMIT
            )
            text = run.stdout if report.exists() else run.stderr + run.stdout
        except subprocess.TimeoutExpired:
            text = f"no end in {LIMIT} s"
    outcome = _judge(mistake, json.loads(report.read_text()) if report.exists() else {}, time.monotonic() - start, text)
    print(f"{outcome.verdict}: {mistake.name} ({outcome.seconds:.0f} s)\n  expected: {mistake.module}")
    print(f"  found:    {outcome.found}\n  because:  {outcome.explanation}", flush=True)
    return outcome


def _judge(mistake: Mistake, report: Mapping[str, Any], seconds: float, text: str) -> Outcome:
    culprit = (report.get("location") or {}).get("culprit") or {}
    found = f"{culprit['module']}, {culprit['phase']}" if culprit else ""
    explanation = culprit.get("explanation", "")
    if not report:
        verdict = "FAILED"
    elif report["passed"]:
        verdict = "NOT CAUGHT"
    elif not re.fullmatch(mistake.module, found):
        verdict = "MISNAMED"
    else:
        verdict = "NAMED" if re.search(mistake.says, explanation) else "MISEXPLAINED"
    lines = text.splitlines()[-9:] if verdict != "FAILED" else text.splitlines()[-25:]
    return Outcome(verdict=verdict, found=found, explanation=explanation, seconds=seconds, output="\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
