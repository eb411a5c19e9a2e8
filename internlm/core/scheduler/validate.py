"""Validation of a schedule by simulation: whether its action table can be executed, and when each action runs.

An action starts when its rank has ended the previous action of its row, and its input has arrived:

- F of virtual stage v needs F of v − 1,
- B of v needs B of v + 1, and F of v,
- W of v needs B of v.

A message to another rank takes the time ``Costs.transfer``, during which both ranks can run actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, ActionType, Table, input_message
from internlm.core.scheduler.timeline import Costs, Span, Timeline, peak_in_flight
from internlm.utils.errors import Problem, UserError

#: By type of an action, the type that must run first on the same rank, chunk and micro-batch.
_PREREQUISITE: dict[str, ActionType] = {BACKWARD: FORWARD, WEIGHT: BACKWARD}
#: Maximum number of actions, or of blocked ranks, listed in an error.
_LISTED = 4


class ScheduleError(UserError):
    """Error for a pipeline schedule that is invalid, or whose file cannot be read or written."""

    same_on_all_ranks = True


def problems(table: Table) -> list[Problem]:
    """Return the problems of ``table``: missing, duplicate or unknown actions, wrong order, deadlock."""
    stages, rows = table.stage_layout.stages, len(table.actions)
    if rows != stages:
        message = f"expected {stages} rows of actions, one per rank, got {rows}"
        return [Problem(f"ranks 0 to {stages - 1}", message, "Write one row per rank, or change the number of stages")]
    if found := [problem for rank in range(stages) for problem in _problems_of_row(table, rank)]:
        return found
    # Whether ranks deadlock does not depend on durations, so any costs will do.
    simulation = _Simulation(table, Costs.uniform(table.stage_layout.virtual_stages))
    return [_deadlock(simulation.blocked)] if simulation.blocked else []


def simulate(table: Table, costs: Costs) -> Timeline:
    """Simulate ``table``, starting every action as early as possible.

    Raises:
        ScheduleError: The table has problems (:func:`problems`).
    """
    if found := problems(table):
        raise ScheduleError(*found)
    assert len(costs.forward) == len(costs.backward) == len(costs.weight) == table.stage_layout.virtual_stages
    spans = tuple(map(tuple, _Simulation(table, costs).spans))
    peaks = tuple(peak_in_flight(table, rank) for rank in range(table.stage_layout.stages))
    return Timeline(table, costs, spans, peaks)


def _problems_of_row(table: Table, rank: int) -> Iterator[Problem]:
    """Yield the problems of one rank's row that do not depend on other rows."""
    row, where = table.actions[rank], f"rank {rank}"
    required = _required(table)
    counts = Counter(row)
    known = {*required, *(action._replace(type=WEIGHT) for action in required if action.type == BACKWARD)}
    if unknown := [action for action in counts if action not in known]:
        sizes = f"chunks 0 to {table.stage_layout.chunks - 1} and micro-batches 0 to {table.micro_batches - 1}"
        yield Problem(where, f"has {_listed(unknown)}, but the schedule has only {sizes}", "Remove these actions")
    if doubled := [action for action in counts if counts[action] > 1]:
        yield Problem(where, f"has {_listed(doubled)} more than once", "Remove the duplicates")
    if missing := [action for action in required if action not in counts]:
        yield Problem(where, f"lacks {_listed(missing)}", "Write an F and a B of every chunk for every micro-batch")
    positions = {action: index for index, action in reversed(list(enumerate(row)))}
    for action in positions:
        if action.type in _PREREQUISITE:
            before = action._replace(type=_PREREQUISITE[action.type])
            if positions[action] < positions.get(before, -1):
                yield Problem(where, f"has {action} before {before}", f"Put {before} first")


def _required(table: Table) -> list[Action]:
    """Return the actions that every rank must run: F, and B unless the table is forward-only; W is optional."""
    has_backward = any(action.type != FORWARD for row in table.actions for action in row)
    types: tuple[ActionType, ...] = (FORWARD, BACKWARD) if has_backward else (FORWARD,)
    return [
        Action(action_type, micro_batch, chunk)
        for micro_batch in range(table.micro_batches)
        for chunk in range(table.stage_layout.chunks)
        for action_type in types
    ]


def _listed(actions: list[Action]) -> str:
    more = f" and {len(actions) - _LISTED} more" if len(actions) > _LISTED else ""
    return ", ".join(map(str, actions[:_LISTED])) + more


class _Wait(NamedTuple):
    """Wait of a rank that blocks at ``action`` until action ``needed`` of rank ``source`` has run."""

    rank: int
    action: Action
    needed: Action
    source: int

    def __str__(self) -> str:
        source = f"rank {self.source}" if self.source != self.rank else "the same rank"
        return f"rank {self.rank} blocks at {self.action} until {source} has run {self.needed}"


class _Simulation:
    """Simulation of an action table: each rank runs until it blocks, and resumes once the needed action has run."""

    def __init__(self, table: Table, costs: Costs) -> None:
        self.table, self.costs = table, costs
        self.spans: list[list[Span]] = [[] for _ in table.actions]
        self._ends: dict[tuple[int, Action], float] = {}
        self._waiting: dict[tuple[int, Action], _Wait] = {}
        self._ready = list(range(table.stage_layout.stages))
        while self._ready:
            self._advance(self._ready.pop())

    @property
    def blocked(self) -> dict[int, _Wait]:
        """Waits that never end, by rank."""
        return {wait.rank: wait for wait in self._waiting.values()}

    def _advance(self, rank: int) -> None:
        spans = self.spans[rank]
        # A rank that was blocked resumes after the actions that it has already run.
        for action in self.table.actions[rank][len(spans) :]:
            start = spans[-1].end if spans else 0
            if source := _source(self.table, rank, action):
                if source not in self._ends:
                    self._waiting[source] = _Wait(rank, action, source[1], source[0])
                    return
                start = max(start, self._ends[source] + (self.costs.transfer if source[0] != rank else 0))
            end = start + self.costs.of(self.table, rank, action)
            spans.append(Span(action, start, end))
            self._ends[rank, action] = end
            if waiter := self._waiting.pop((rank, action), None):
                self._ready.append(waiter.rank)


def _source(table: Table, rank: int, action: Action) -> tuple[int, Action] | None:
    """Return the rank and the action that compute the input of ``action``; None if it takes no message."""
    layout = table.stage_layout
    message = input_message(layout, rank, action)
    if message is None:
        return None
    return layout.rank_of(message.sender), action._replace(chunk=layout.chunk_of(message.sender))


def _deadlock(blocked: dict[int, _Wait]) -> Problem:
    """Return a problem that describes a deadlock: the cycle found by following the waits from rank to rank."""
    chain = [next(iter(blocked.values()))]
    while (wait := blocked[chain[-1].source]) not in chain:
        chain.append(wait)
    circle = sorted(chain[chain.index(wait) :])
    ranks = ", ".join(str(wait.rank) for wait in circle)
    where = f"ranks {ranks}" if len(circle) > 1 else f"rank {ranks}"
    more = f"; {len(circle) - _LISTED} more ranks block" if len(circle) > _LISTED else ""
    message = f"deadlock: {'; '.join(map(str, circle[:_LISTED]))}{more}"
    first, source = circle[0], blocked[circle[0].source]
    todo = f"Reorder a row: for example, move {first.needed} of rank {source.rank} before {source.action}"
    return Problem(where, message, todo)
