"""Whether a schedule can run, and how: a simulation. Pure.

An action starts when its rank has ended the one before it in the table, and what it needs is there:

- F of virtual stage v needs F of v − 1,
- B of v needs B of v + 1, and its own F,
- W needs its own B.

What comes from another rank arrives ``transfer`` later; a transfer takes no time of either rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, Table
from internlm.utils.errors import Problem, UserError

#: What has to come before an action of the same rank, chunk and micro-batch.
_BEFORE = {BACKWARD: FORWARD, WEIGHT: BACKWARD}
_SHOWN = 4


class ScheduleError(UserError):
    """Problems of a pipeline schedule."""

    same_on_all_ranks = True


@dataclass(frozen=True)
class Costs:
    """How long actions take, in any one unit: a tuple has an item for each virtual stage."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]  # without the gradient of the weights
    weight: tuple[float, ...]
    transfer: float = 0.0  # between two ranks; between chunks of one rank nothing is sent

    @classmethod
    def uniform(
        cls,
        virtual_stages: int,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        transfer: float = 0.0,
    ) -> Costs:
        """The same costs for every virtual stage."""
        n = virtual_stages
        return cls((forward,) * n, (backward,) * n, (weight,) * n, transfer)

    def of(self, table: Table, rank: int, action: Action) -> float:
        """How long ``rank`` takes for ``action``: a B without a W of its own does the work of both."""
        virtual = table.stage_layout.virtual(rank, action.chunk)
        if action.kind == FORWARD:
            return self.forward[virtual]
        if action.kind == WEIGHT:
            return self.weight[virtual]
        deferred = table.defers_weight(rank, action)
        return self.backward[virtual] + (0 if deferred else self.weight[virtual])


class Span(NamedTuple):
    """When an action ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated schedule."""

    table: Table
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]  # by rank
    #: By rank, how many activations it holds at most, one being a chunk's for a micro-batch: held from the start of F
    #: to the end of the last backward action, which is W, or B where there is no W.
    peak_in_flight: tuple[int, ...]

    @property
    def end(self) -> float:
        """The makespan: when the last rank ends, the first having started at 0."""
        return max(row[-1].end for row in self.spans)

    @property
    def bubble(self) -> float:
        """The idle share, 0 to 1, of the time of all ranks."""
        busy = sum(span.end - span.start for row in self.spans for span in row)
        return 1 - busy / (len(self.spans) * self.end)


def problems(table: Table) -> list[Problem]:
    """All that keeps ``table`` from running: missing, doubled or foreign actions, a wrong order, or ranks that wait for
    one another."""
    stages, rows = table.stage_layout.stages, len(table.actions)
    if rows != stages:
        what = f"{rows} rows for {stages} stages"
        return [Problem(f"ranks 0 to {stages - 1}", what, "Give each rank a row.")]
    if found := [problem for rank in range(stages) for problem in _problems_of_row(table, rank)]:
        return found
    run = _Run(table, Costs.uniform(table.stage_layout.virtual_stages))
    return [_deadlock(run.stuck)] if run.stuck else []


def simulate(table: Table, costs: Costs) -> Timeline:
    """Run ``table`` in thought, each action as early as it can; raises :class:`ScheduleError` where it cannot run."""
    if found := problems(table):
        raise ScheduleError(*found)
    assert len(costs.forward) == len(costs.backward) == len(costs.weight) == table.stage_layout.virtual_stages
    spans = tuple(map(tuple, _Run(table, costs).spans))
    return Timeline(
        table, costs, spans, tuple(peak_in_flight(table, rank) for rank in range(table.stage_layout.stages))
    )


def _problems_of_row(table: Table, rank: int) -> Iterator[Problem]:
    """What can be seen from one rank's row alone."""
    row, where = table.actions[rank], f"rank {rank}"
    due = _due(table)
    counts = Counter(row)
    known = {*due, *(action._replace(kind=WEIGHT) for action in due if action.kind == BACKWARD)}
    if foreign := [action for action in counts if action not in known]:
        size = f"chunks 0 to {table.stage_layout.chunks - 1} and micro-batches 0 to {table.micro_batches - 1}"
        yield Problem(where, f"has {_some(foreign)}, but there are {size} only", "Leave it out.")
    if doubled := [action for action in counts if counts[action] > 1]:
        yield Problem(where, f"has {_some(doubled)} more than once", "Leave one of them.")
    if missing := [action for action in due if action not in counts]:
        yield Problem(where, f"lacks {_some(missing)}", "Every chunk needs an F and a B for every micro-batch.")
    place = {action: index for index, action in reversed(list(enumerate(row)))}
    for action in place:
        if action.kind in _BEFORE:
            before = action._replace(kind=_BEFORE[action.kind])
            if place[action] < place.get(before, -1):
                yield Problem(where, f"has {action} before {before}", f"Put {before} first.")


def _due(table: Table) -> list[Action]:
    """What every rank must run. W may be left to B, and a table may be of F alone."""
    has_backward = any(action.kind != FORWARD for row in table.actions for action in row)
    return [
        Action(kind, micro_batch, chunk)
        for micro_batch in range(table.micro_batches)
        for chunk in range(table.stage_layout.chunks)
        for kind in (FORWARD, BACKWARD)[: 1 + has_backward]
    ]


def _some(actions: list[Action]) -> str:
    more = f" and {len(actions) - _SHOWN} more" if len(actions) > _SHOWN else ""
    return ", ".join(map(str, actions[:_SHOWN])) + more


class _Wait(NamedTuple):
    """A rank stands still at ``action`` until ``needed`` of rank ``of`` has run."""

    rank: int
    action: Action
    needed: Action
    of: int

    def __str__(self) -> str:
        whose = f"rank {self.of}" if self.of != self.rank else "its own"
        return f"rank {self.rank} at {self.action} for {self.needed} of {whose}"


class _Run:
    """Every rank goes as far as it can; one that has to wait is gone on with once what it needs has run."""

    def __init__(self, table: Table, costs: Costs) -> None:
        self.table, self.costs = table, costs
        self.spans: list[list[Span]] = [[] for _ in table.actions]
        self._ends: dict[tuple[int, Action], float] = {}
        self._waiting: dict[tuple[int, Action], _Wait] = {}
        self._ready = list(range(table.stage_layout.stages))
        while self._ready:
            self._advance(self._ready.pop())

    @property
    def stuck(self) -> dict[int, _Wait]:
        """By rank, what it waits for in vain."""
        return {wait.rank: wait for wait in self._waiting.values()}

    def _advance(self, rank: int) -> None:
        spans = self.spans[rank]
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
    """The rank and action of the neighbouring virtual stage whose result ``action`` takes; None where there is none."""
    if action.kind == WEIGHT:
        return None
    cut = table.stage_layout
    virtual = cut.virtual(rank, action.chunk) + (-1 if action.kind == FORWARD else 1)
    if not 0 <= virtual < cut.virtual_stages:
        return None
    return cut.rank_of(virtual), action._replace(chunk=cut.chunk_of(virtual))


def _deadlock(stuck: dict[int, _Wait]) -> Problem:
    """Follow who waits for whom until it comes round."""
    chain = [next(iter(stuck.values()))]
    while (wait := stuck[chain[-1].of]) not in chain:
        chain.append(wait)
    circle = sorted(chain[chain.index(wait) :])
    ranks = ", ".join(str(wait.rank) for wait in circle)
    where, whom = (f"ranks {ranks}", "one another") if len(circle) > 1 else (f"rank {ranks}", "itself")
    what = f"deadlock: waits for {whom}: {'; '.join(map(str, circle))}"
    return Problem(where, what, "Put one of the actions waited for earlier in its rank's row.")


def peak_in_flight(table: Table, rank: int) -> int:
    """How many activations ``rank`` holds at most, see :class:`Timeline`. It does one thing at a time, so its order
    alone says it."""
    held = peak = 0
    for action in table.actions[rank]:
        if action.kind == FORWARD:
            held += 1
            peak = max(peak, held)
        elif action.kind == WEIGHT or not table.defers_weight(rank, action):
            held -= 1
    return peak
