"""A schedule as a CSV file: a line for each rank, a cell for each action in the order in which the rank runs them.

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
from dataclasses import replace
from pathlib import Path

from internlm.core.scheduler.actions import Action, Cut, Table
from internlm.core.scheduler.validate import ScheduleError, problems
from internlm.utils.errors import Problem

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
    table = Table(path.name, Cut(stages, chunks, v_shaped), micro_batches, rows)
    faults = faults or [replace(problem, where=f"{path}, {problem.where}") for problem in problems(table)]
    if faults:
        raise ScheduleError(*faults)
    return table


def write_table(table: Table, path: Path) -> None:
    """Write ``table`` so that :func:`read_table` gives it back; raises :class:`ScheduleError` where that can't be."""
    cut = table.cut
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
