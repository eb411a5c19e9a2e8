"""Generate the action tables of the built-in pipeline schedules; read and write action tables as CSV files.

A row of a table contains the actions of one rank. It is generated from phases, each a pair (pattern, repeats). Each
letter of a pattern stands for the next action of its type and is skipped if none is left. Hence one list of phases
(warm-up, steady, cool-down) fits any number of micro-batches.

=======  ==============================================================
F, B, W  forward, backward and weight gradient of chunk 0
f, b, w  forward, backward and weight gradient of chunk 1, if there are two
=======  ==============================================================

Symbols: p stages, i rank, v chunks per rank, m micro-batches.

A CSV file has one line per rank and one cell per action, in the order of execution::

    # 1F1B: two stages, three micro-batches
    F0,F1,B0,F2,B1,B2
    F0,B0,F1,B1,F2,B2

``F3`` is the forward of chunk 0 for micro-batch 3, ``F3.1`` that of chunk 1; see
:mod:`internlm.core.scheduler.actions`. A line ``V`` before the ranks selects the V-shaped stage layout. Lower case,
blanks, empty cells, empty lines and lines that start with ``#`` are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from internlm.core.scheduler.actions import BACKWARD, FORWARD, Action, ActionType, Table
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.validate import ScheduleError, problems
from internlm.utils.errors import Problem, did_you_mean

ScheduleName: TypeAlias = Literal["gpipe", "1f1b", "interleaved", "zbh1", "zbv"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)

Row: TypeAlias = Iterator[Action]
Phase: TypeAlias = tuple[str, int]

_MODES: dict[str, ScheduleName] = {"GPIPE": "gpipe", "1F1B": "1f1b", "ZBH1": "zbh1", "ZBV": "zbv"}


def schedule_of(mode: str, chunks: int) -> ScheduleName:
    """Return the schedule name for ``parallel.pipeline.mode``; for 1F1B with several chunks, it is ``interleaved``."""
    return "interleaved" if mode == "1F1B" and chunks > 1 else _MODES[mode]


# Cached: the memory plan of each stage of a pipeline needs the same table.
@lru_cache(maxsize=8)
def make_table(schedule: str, stages: int, chunks: int, micro_batches: int) -> Table:
    """Return the action table of a built-in schedule.

    Args:
        schedule: Name of the schedule, one of :data:`SCHEDULES`.
        stages: Number of ranks of the pipeline.
        chunks: Number of chunks per rank.
        micro_batches: Number of micro-batches of a step.

    Raises:
        ScheduleError: The name is unknown, or the schedule does not support the number of stages, chunks or
            micro-batches.
    """
    if schedule not in SCHEDULES:
        raise ScheduleError(Problem("schedule", f"{schedule!r} is unknown", did_you_mean(schedule, SCHEDULES)))
    row, required_chunks = _ROWS[schedule]
    sizes = {"stages": stages, "chunks": chunks, "micro-batches": micro_batches}
    found = [
        Problem(f"schedule {schedule}", f"number of {name} must be at least 1, got {size}", "Use a positive number")
        for name, size in sizes.items()
        if size < 1
    ]
    if not found and required_chunks not in (None, chunks):
        message = f"expected chunks = {required_chunks}, got {chunks}"
        found = [Problem(f"schedule {schedule}", message, "Change the number of chunks or the schedule")]
    if found:
        raise ScheduleError(*found)
    rows = tuple(tuple(row(rank, stages, chunks, micro_batches)) for rank in range(stages))
    return Table(schedule, stage_layout_of(schedule, stages, chunks), micro_batches, rows)


def stage_layout_of(schedule: str, stages: int, chunks: int) -> StageLayout:
    """Return the stage layout of a schedule: V-shaped for ``zbv``, else round-robin."""
    return StageLayout(stages, chunks, v_shaped=schedule == "zbv")


# -- rows of one rank -------------------------------------------------------------------------------------------------
def _gpipe(i: int, p: int, v: int, m: int) -> Row:
    """Return the actions of rank i: all forwards, then all backwards (GPipe, arXiv 1811.06965)."""
    return _row((("F", m), ("B", m)), _actions(m))


def _1f1b(i: int, p: int, v: int, m: int) -> Row:
    """Return the actions of rank i, each backward as early as possible (1F1B or PipeDream-Flush, arXiv 2006.09503).

    A backward frees the activations of its micro-batch before the next forward. With one stage, this is gradient
    accumulation: F0 B0 F1 B1 …
    """
    # Warm-up: p − i forwards until the first gradient arrives. Cool-down: repeats in which no F is left.
    return _row((("F", p - i), ("BF", m)), _actions(m))


def _interleaved(i: int, p: int, v: int, m: int) -> Row:
    """Return the actions of rank i for interleaved 1F1B with v chunks per rank (arXiv 2104.04473, sec. 2.2).

    Filling the pipeline takes 1/v of the time that it takes with one chunk per rank. Micro-batches run in rounds of p.
    Each round passes through chunk 0, then chunk 1, and so on; backward starts with the last chunk.
    """
    # An incomplete last round is generated as a complete one, and its surplus is removed: actions of different
    # micro-batches do not depend on one another, so a table that can run can also run with fewer micro-batches.
    rounds = range(0, m, p)
    forward = [Action(FORWARD, start + j, chunk) for start in rounds for chunk in range(v) for j in range(p)]
    backward = [action._replace(type=BACKWARD, chunk=v - 1 - action.chunk) for action in forward]
    # Twice the distance to the last rank, as in Megatron: one forward more than necessary for each rank in between, so
    # that a transfer never delays the next action.
    warm_up = (p - i - 1) * 2 + (v - 1) * p
    phases = ("F", warm_up), ("FB", len(forward))
    return _first(m, _row(phases, {"F": iter(forward), "B": iter(backward)}))


def _zbh1(i: int, p: int, v: int, m: int) -> Row:
    """Return the actions of rank i for 1F1B with W deferred by i micro-batches (ZB-H1, arXiv 2401.10241, sec. 2.1).

    Every rank then has p micro-batches in flight, and the deferred W actions fill the idle time of 1F1B's cool-down.
    """
    # BF i times: i deferred W keep p micro-batches in flight on every rank.
    return _row((("F", p - i), ("BF", i), ("BWF", m), ("W", m)), _actions(m))


def _zbv(i: int, p: int, v: int, m: int) -> Row:
    """Return the actions of rank i for ZB-V, two chunks per rank in a V shape (arXiv 2405.15362; 2401.10241, sec. 6).

    No rank idles between its first and its last action if F, B and W take equal time. The last virtual stage is on rank
    0, so the first backward starts on the rank of the first forward.
    """
    # The phases need at least 2p − 1 micro-batches; with fewer, the surplus is removed.
    n = max(m, 2 * p - 1)
    warm_up = ("F", 2 * (p - i) - 1), ("fF", i), ("fbw", p - i)
    steady = (("FBWfbw", n - p),)
    cool_down = ("Bb", i), ("BW", p - i), ("w", i), ("W", i)
    return _first(m, _row(warm_up + steady + cool_down, _actions(n)))


#: Function that generates a row, and required number of chunks per rank (None: any), of each schedule.
_ROWS: dict[str, tuple[Callable[[int, int, int, int], Row], int | None]] = {
    "gpipe": (_gpipe, 1),
    "1f1b": (_1f1b, 1),
    "interleaved": (_interleaved, None),
    "zbh1": (_zbh1, 1),
    "zbv": (_zbv, 2),
}


def _actions(m: int) -> dict[str, Row]:
    """Return, for each letter of a pattern, an iterator over its actions for micro-batches 0 … m − 1."""
    return {
        letter: iter([Action(_action_type(letter), j, int(letter.islower())) for j in range(m)]) for letter in "FBWfbw"
    }


def _action_type(letter: str) -> ActionType:
    return cast(ActionType, letter.upper())


def _row(phases: tuple[Phase, ...], actions: dict[str, Row]) -> Row:
    """Yield the actions of a row: each letter of a pattern takes the next action of that letter."""
    for pattern, repeats in phases:
        for letter in pattern * repeats:
            if action := next(actions[letter], None):
                yield action


def _first(m: int, row: Row) -> Row:
    """Keep the actions of micro-batches 0 … m − 1."""
    return (action for action in row if action.micro_batch < m)


# -- CSV files --------------------------------------------------------------------------------------------------------
_CELL = re.compile(r"([FBW])(\d{1,9})(?:\.(\d{1,9}))?", re.IGNORECASE | re.ASCII)
_V = "V"
_TODO = "Write F, B or W and the micro-batch, as in F3, or F3.1 for chunk 1, separated by commas"


def read_table(path: Path, stages: int, chunks: int, micro_batches: int) -> Table:
    """Read a schedule from a CSV file and validate it.

    Args:
        path: CSV file, in the format that :mod:`internlm.core.scheduler.table` describes. The name of the file becomes
            the name of the schedule.
        stages: Expected number of ranks of the pipeline.
        chunks: Expected number of chunks per rank.
        micro_batches: Expected number of micro-batches of a step.

    Raises:
        ScheduleError: The file cannot be read, cells are not actions, or the table cannot be executed. The error lists
            all problems.
    """
    lines = _lines(path)
    v_shaped = bool(lines) and "".join(lines[0][1]).upper() == _V
    faults: list[Problem] = []
    rows = tuple(tuple(_parse_row(f"{path}:{line}", cells, faults)) for line, cells in lines[v_shaped:])
    table = Table(path.name, StageLayout(stages, chunks, v_shaped), micro_batches, rows)
    faults = faults or [replace(problem, where=f"{path}, {problem.where}") for problem in problems(table)]
    if faults:
        raise ScheduleError(*faults)
    return table


def write_table(table: Table, path: Path) -> None:
    """Write ``table`` as a CSV file that :func:`read_table` reads.

    Raises:
        ScheduleError: ``path`` cannot be written.
    """
    layout = table.stage_layout
    sizes = f"stages {layout.stages}, chunks {layout.chunks}, micro-batches {table.micro_batches}"
    rows = [",".join(map(str, row)) for row in table.actions]
    try:
        text = "\n".join([f"# {table.schedule}: {sizes}", *[_V] * layout.v_shaped, *rows, ""])
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScheduleError(Problem(str(path), f"cannot be written ({error.strerror})", "Use another path")) from None


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of every line that is neither empty nor a comment; an empty cell is ''."""
    try:
        # Spreadsheet programs write a byte order mark at the start of UTF-8 files.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ScheduleError(Problem(str(path), f"cannot be read ({error.strerror})", "Use a readable file")) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (at byte {error.start})"
        raise ScheduleError(Problem(str(path), message, "Save the file as CSV in UTF-8")) from None
    cells = [[cell.strip(' \t"') for cell in line.split(",")] for line in text.splitlines()]
    return [(line, row) for line, row in enumerate(cells, 1) if any(row) and not row[0].startswith("#")]


def _parse_row(where: str, cells: list[str], faults: list[Problem]) -> list[Action]:
    """Return the actions of a line; append a problem to ``faults`` for each cell that is not an action."""
    actions = []
    for column, cell in enumerate(cells, 1):
        if not cell:
            continue
        if match := _CELL.fullmatch(cell):
            letter, micro_batch, chunk = match.groups()
            actions.append(Action(_action_type(letter), int(micro_batch), int(chunk or 0)))
        else:
            faults.append(Problem(f"{where}, cell {column}", f"{cell!r} is not an action", _TODO))
    return actions
