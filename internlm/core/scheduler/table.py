"""The schedules: which action each rank of a pipeline runs when. Pure.

A row is written in phases, (pattern, times): each letter of a pattern takes the next action of its sort, and is passed
over when there is none left. So one list of phases fits any number of micro-batches.

=======  =========================================
F, B, W  forward, backward, weight gradient
f, b, w  the same for chunk 1, where both are named
=======  =========================================

p: stages, i: rank, v: chunks, m: micro-batches.

A schedule as a CSV file: a line for each rank, a cell for each action in the order in which the rank runs them.

::

    # 1F1B: two stages, three micro-batches
    F0,F1,B0,F2,B1,B2
    F0,B0,F1,B1,F2,B2

``F3`` is the forward for micro-batch 3, ``F3.1`` that of chunk 1; see :mod:`internlm.core.scheduler.actions`. A line
``V`` before the ranks says that the chunks lie in a V. Lower case, blanks, empty cells, empty lines and lines that
start with ``#`` do no harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from internlm.core.scheduler.actions import BACKWARD, FORWARD, Action, StageLayout, Table
from internlm.core.scheduler.validate import ScheduleError, problems
from internlm.utils.errors import Problem, did_you_mean

Row = Iterator[Action]
Phase = tuple[str, int]

_MODES = {"GPIPE": "gpipe", "1F1B": "1f1b", "ZBH1": "zbh1", "ZBV": "zbv"}


def kind_of(mode: str, chunks: int) -> str:
    """The kind of table for ``parallel.pipeline.mode``: 1F1B with several chunks is interleaved."""
    return "interleaved" if mode == "1F1B" and chunks > 1 else _MODES[mode]


def make_table(kind: str, stages: int, chunks: int, micro_batches: int) -> Table:
    """The schedule ``kind``, one of :data:`KINDS`; raises :class:`ScheduleError` for a size that it does not have."""
    if kind not in KINDS:
        raise ScheduleError(Problem("schedule", f"there is no kind {kind!r}", did_you_mean(kind, KINDS)))
    row, has_chunks = _KINDS[kind]
    sizes = {"stages": stages, "chunks": chunks, "micro-batches": micro_batches}
    found = [Problem("schedule", f"{name} = {n}", "Use at least 1.") for name, n in sizes.items() if n < 1]
    if not found and has_chunks not in (None, chunks):
        found = [Problem("schedule", f"{kind} with chunks = {chunks}", f"Use chunks = {has_chunks}.")]
    if found:
        raise ScheduleError(*found)
    rows = tuple(tuple(row(rank, stages, chunks, micro_batches)) for rank in range(stages))
    return Table(kind, stage_layout_of(kind, stages, chunks), micro_batches, rows)


def stage_layout_of(kind: str, stages: int, chunks: int) -> StageLayout:
    """How a model is cut for ``kind``."""
    return StageLayout(stages, chunks, v_shaped=kind == "zbv")


def _gpipe(i: int, p: int, v: int, m: int) -> Row:
    """All forwards, then all backwards. GPipe, arXiv 1811.06965."""
    return _written((("F", m), ("B", m)), _work(m))


def _1f1b(i: int, p: int, v: int, m: int) -> Row:
    """As soon as a backward can run it does, and frees the memory for the next forward.

    PipeDream-Flush, arXiv 2006.09503. With one stage: F0 B0 F1 B1 …, accumulation of gradients.
    """
    return _written((("F", p - i), ("BF", m)), _work(m))


def _interleaved(i: int, p: int, v: int, m: int) -> Row:
    """1F1B of v chunks a rank, which fills the pipeline in 1/v of the time. Megatron, arXiv 2104.04473.

    In rounds of p micro-batches: a round goes through chunk 0, then chunk 1, …; backward starts from the last chunk.
    The last round is laid out as a whole one and what it has too much left out: actions of different micro-batches
    never need one another, so a table that can run still can without some of them.
    """
    rounds = range(0, m, p)
    forward = [Action(FORWARD, start + j, chunk) for start in rounds for chunk in range(v) for j in range(p)]
    backward = [action._replace(kind=BACKWARD, chunk=v - 1 - action.chunk) for action in forward]
    warm_up = (p - i - 1) * 2 + (v - 1) * p
    phases = ("F", warm_up), ("FB", len(forward))
    return _first(m, _written(phases, {"F": iter(forward), "B": iter(backward)}))


def _zbh1(i: int, p: int, v: int, m: int) -> Row:
    """1F1B whose W run i micro-batches late, so that every rank holds p micro-batches, and the W left over at the end
    fill the time in which 1F1B waits. ZB-H1, arXiv 2401.10241."""
    return _written((("F", p - i), ("BF", i), ("BWF", m), ("W", m)), _work(m))


def _zbv(i: int, p: int, v: int, m: int) -> Row:
    """Two chunks in a V: the last virtual stage is on rank 0, so that the first backward starts where the first forward
    did, and no rank ever waits where F, B and W take equally long. ZB-V, arXiv 2401.10241; V-ZB, arXiv 2405.15362.

    The phases need 2p − 1 micro-batches to fill; of fewer, the rest is left out again.
    """
    n = max(m, 2 * p - 1)
    fill = ("F", 2 * (p - i) - 1), ("fF", i), ("fbw", p - i)
    steady = (("FBWfbw", n - p),)
    drain = ("Bb", i), ("BW", p - i), ("w", i), ("W", i)
    return _first(m, _written(fill + steady + drain, _work(n)))


def _work(m: int) -> dict[str, Row]:
    """By letter, its actions for all micro-batches."""
    return {letter: iter([Action(letter.upper(), j, int(letter.islower())) for j in range(m)]) for letter in "FBWfbw"}


def _written(phases: tuple[Phase, ...], work: dict[str, Row]) -> Row:
    """The actions that the patterns of ``phases`` take from ``work``."""
    for pattern, times in phases:
        for letter in pattern * times:
            if action := next(work[letter], None):
                yield action


def _first(m: int, row: Row) -> Row:
    """``row`` without micro-batches from m on."""
    return (action for action in row if action.micro_batch < m)


#: By kind: what writes a row, and how many chunks a rank has (None: any number).
_KINDS: dict[str, tuple[Callable[[int, int, int, int], Row], int | None]] = {
    "gpipe": (_gpipe, 1),
    "1f1b": (_1f1b, 1),
    "interleaved": (_interleaved, None),
    "zbh1": (_zbh1, 1),
    "zbv": (_zbv, 2),
}
KINDS = tuple(_KINDS)


_ACTION = re.compile(r"([FBW])(\d{1,9})(?:\.(\d{1,9}))?", re.IGNORECASE | re.ASCII)
_V = "V"
_TODO = "Write F, B or W and the micro-batch, as in F3, or F3.1 for chunk 1; commas between."


def read_table(path: Path, stages: int, chunks: int, micro_batches: int) -> Table:
    """The schedule in the file ``path``, of the kind that is the file's name.

    Raises :class:`ScheduleError` with all cells that are no actions, or else with all that keeps it from running.
    """
    lines = _lines(path)
    v_shaped = bool(lines) and "".join(lines[0][1]).upper() == _V
    faults: list[Problem] = []
    rows = tuple(tuple(_actions(f"{path}:{number}", cells, faults)) for number, cells in lines[v_shaped:])
    table = Table(path.name, StageLayout(stages, chunks, v_shaped), micro_batches, rows)
    faults = faults or [replace(problem, where=f"{path}, {problem.where}") for problem in problems(table)]
    if faults:
        raise ScheduleError(*faults)
    return table


def write_table(table: Table, path: Path) -> None:
    """Write ``table`` so that :func:`read_table` gives it back; raises :class:`ScheduleError` where that can't be."""
    cut = table.stage_layout
    title = f"# {table.kind}: stages {cut.stages}, chunks {cut.chunks}, micro-batches {table.micro_batches}"
    rows = [",".join(map(str, row)) for row in table.actions]
    try:
        path.write_text("\n".join([title, *[_V] * cut.v_shaped, *rows, ""]), encoding="utf-8")
    except OSError as error:
        raise ScheduleError(Problem(str(path), f"can't be written ({error.strerror})", "Give another path.")) from None


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that says something; an empty cell is ''."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ScheduleError(Problem(str(path), f"can't be read ({error.strerror})", "Give a readable file.")) from None
    except UnicodeDecodeError:
        raise ScheduleError(Problem(str(path), "isn't UTF-8 text", "Save it as CSV in UTF-8.")) from None
    cells = [[cell.strip(' \t"') for cell in line.split(",")] for line in text.splitlines()]
    return [(number, row) for number, row in enumerate(cells, 1) if any(row) and not row[0].startswith("#")]


def _actions(where: str, cells: list[str], faults: list[Problem]) -> list[Action]:
    """The actions of a line; adds to ``faults`` what is none."""
    matches = {place: _ACTION.fullmatch(cell) for place, cell in enumerate(cells, 1) if cell}
    for place, match in matches.items():
        if not match:
            faults.append(Problem(f"{where}, cell {place}", f"{cells[place - 1]!r} is no action", _TODO))
    found = [match.groups() for match in matches.values() if match]
    return [Action(kind.upper(), int(micro_batch), int(chunk or 0)) for kind, micro_batch, chunk in found]
