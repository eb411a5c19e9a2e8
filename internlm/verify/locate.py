"""Location of a mistake: the smallest layout that still differs, and the first tensor that differs in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

from internlm.verify.compare import Report, TrafficError
from internlm.verify.configs import Plan
from internlm.verify.culprit import Culprit, find_culprit
from internlm.verify.report import heading
from internlm.verify.session import Session
from internlm.verify.shrink import DTYPE, Attempt, smallest

#: A smaller layout counts as hung after this many times the time of the slowest run that has finished, and ``SLACK``.
EXPECTED = 2.0
#: Seconds in which the processes of a run start.
SLACK = 15.0


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a layout differs from one process."""

    attempt: Attempt
    """Smallest layout that still differs."""
    plan: Plan
    report: Report
    culprit: Culprit | None
    """First tensor that differs; None: nothing differed while the tensors were recorded."""


def locate(session: Session, attempt: Attempt, given: Report) -> Location:
    """Return the smallest layout that still differs, and the first tensor that differs in it.

    Args:
        session: Processes to run on.
        attempt: Layout whose ranks differ from one process.
        given: Report on this layout.

    Raises:
        UserError: A rank raised a UserError.
        RankError: A rank raised another exception, died, or did not finish in time.
    """
    timeout = min(session.timeout, EXPECTED * session.slowest + SLACK)
    found = smallest(attempt, lambda plan: not session.compare(plan, timeout).passed)
    plan = found.plan()
    # The last step: with one step less, nothing differs.
    report, alone, ranks = session.compare_records(plan, details_of=plan.steps - 1)
    culprit = find_culprit(report, alone, ranks)
    groups = wrong_groups(given.traffic or ())
    if culprit is not None and groups:
        said = f"{culprit.explanation}; " * bool(culprit.explanation)
        culprit = replace(culprit, explanation=f"{said}in the layout given, {', '.join(groups)}: the wrong group")
    return Location(attempt=found, plan=plan, report=report, culprit=culprit)


def wrong_groups(errors: Sequence[TrafficError]) -> list[str]:
    """Return, in words, collectives that are called over one mode as often as calls over another are missing.

    In a smaller layout the wrong group may have one rank, and then the collective seems to be missing.
    """
    found: dict[str, None] = {}
    for less, more in permutations(errors, 2):
        same = (less.rank, less.step, less.collective) == (more.rank, more.step, more.collective)
        missing = less.expected.calls - less.counted.calls
        if same and missing > 0 and missing == more.counted.calls - more.expected.calls:
            found[f"{missing} calls of {less.collective} are over {more.mode} instead of {less.mode}"] = None
    return list(found)


def as_dict(location: Location) -> dict[str, Any]:
    """Return the command of the smallest layout, and the culprit, as plain data."""
    culprit = None if location.culprit is None else asdict(location.culprit)
    return {"command": location.attempt.command(), "world_size": location.plan.world_size, "culprit": culprit}


def as_text(location: Location) -> str:
    """Format a location as the last lines of a report."""
    return "\n".join(_lines(location))


def _lines(location: Location) -> Iterator[str]:
    yield f"smallest layout that still differs: {heading(location.plan)}"
    yield f"  {location.attempt.command()}"
    culprit = location.culprit
    if culprit is None:
        timing = "none while tensors are recorded, so it depends on timing: look for a missing wait"
        yield f"culprit: {timing if location.report.passed else f'unknown. {location.report.failures[0]}'}"
        return
    yield f"culprit: {culprit.module}, {culprit.phase}"
    difference = f" by {culprit.difference:.2g}" if culprit.difference else ""
    yield f"  first to differ: {culprit.tensor}{difference}"
    if culprit.after:
        yield f"  last to agree: {culprit.after}"
    if culprit.explanation:
        yield f"  {culprit.explanation}"
    if location.attempt.dtype != DTYPE:
        rounding = f"this may be rounding to {location.attempt.dtype}"
        yield f"  with --dtype {DTYPE} nothing differs, or it does not run: {rounding}"
    if culprit.phase in ("forward", "backward", "gradients", "update", "communication"):
        yield f"  collectives called there: {', '.join(culprit.calls) or 'none'}"
    yield from (f"  against the formula: {error}" for error in (location.report.traffic or ())[:3])
