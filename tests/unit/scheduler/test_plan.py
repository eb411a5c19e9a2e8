"""Plans: what they say of transfers, and that ranks that follow them never wait for one another in a circle."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.core.scheduler.actions import Action, Message, Table
from internlm.core.scheduler.plan import Step, make_plan
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import SCHEDULES, make_table
from internlm.core.scheduler.validate import ScheduleError

CHUNKS = {"gpipe": 1, "1f1b": 1, "zbh1": 1, "zbv": 2}
Plan = Sequence[Step]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Tables of the known schedules."""
    schedule = draw(st.sampled_from(SCHEDULES))
    chunks = CHUNKS.get(schedule) or draw(st.integers(1, 4))
    return make_table(schedule, draw(st.integers(1, 8)), chunks, draw(st.integers(1, 12)))


@st.composite
def own_tables(draw: st.DrawFn) -> Table:
    """What users may write: any order in which everything can run, every B with or without its W."""
    cut = StageLayout(draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.booleans()))
    micro_batches, dice = draw(st.integers(1, 4)), random.Random(draw(st.integers()))
    rows: list[list[Action]] = [[] for _ in range(cut.stages)]
    last = cut.virtual_stages - 1
    ready = [("F", 0, m) for m in range(micro_batches)]  # action_type, virtual stage, micro-batch
    while ready:
        action_type, virtual, m = ready.pop(dice.randrange(len(ready)))
        rows[cut.rank_of(virtual)].append(Action(action_type, m, cut.chunk_of(virtual)))
        if action_type == "F":
            ready.append(("F", virtual + 1, m) if virtual < last else ("B", last, m))
        elif action_type == "B":
            ready += [("B", virtual - 1, m)] * (virtual > 0) + [("W", virtual, m)] * dice.randrange(2)
    return Table("own", cut, micro_batches, tuple(map(tuple, rows)))


def plans_of(table: Table) -> list[Plan]:
    return [make_plan(table, rank) for rank in range(table.stage_layout.stages)]


# -- what a plan says


@given(tables() | own_tables())
def test_every_message_is_begun_once_before_it_is_taken(table: Table) -> None:
    for rank, plan in enumerate(plans_of(table)):
        begun: list[Message] = []
        for step in plan:
            begun += [receive.message for receive in step.receives]
            assert all(
                table.stage_layout.chunk_of(receive.message.virtual) == receive.chunk for receive in step.receives
            )
            assert step.input is None or step.source == rank or step.input in begun
        assert Counter(begun) == Counter(step.input for step in plan if step.input and step.source != rank)


@given(tables() | own_tables())
def test_what_is_given_is_taken_where_it_goes(table: Table) -> None:
    """And nothing else, nor twice: by source and target, the same messages."""
    given, taken = [], []
    for rank, plan in enumerate(plans_of(table)):
        given += [(rank, step.target, step.output) for step in plan if step.output]
        taken += [(step.source, rank, step.input) for step in plan if step.input]
    assert Counter(given) == Counter(taken)
    assert len(set(given)) == len(given) == (table.stage_layout.virtual_stages - 1) * len(messages_of_one(table))


def messages_of_one(table: Table) -> list[tuple[str, int]]:
    """Those that the first virtual stage gives or takes."""
    return [action[:2] for action in table.actions[0] if action.chunk == 0 and action.type != "W"]


@given(own_tables())
def test_a_weight_is_left_where_there_is_a_w_for_it(table: Table) -> None:
    for plan, row in zip(plans_of(table), table.actions, strict=True):
        assert [step.action for step in plan] == list(row)
        for step in plan:
            assert step.defers_weight == (step.action.type == "B" and step.action._replace(type="W") in row)


def test_a_small_plan_in_full() -> None:
    """ZB-V on two ranks, the second: both chunks lie side by side, so what the lower gives stays here."""
    said = []
    for step in make_plan(make_table("zbv", 2, 2, 1), 1):
        begins = [f"{m.type}{m.virtual} from {source}" for source, m, _ in step.receives]
        takes = step.input and f"{step.input.type}{step.input.virtual} from {step.source}"
        gives = step.output and f"{step.output.type}{step.output.virtual} to {step.target}"
        said.append((str(step.action), begins, takes, gives))
    assert said == [
        ("F0", ["F1 from 0"], "F1 from 0", "F2 to 1"),
        ("F0.1", [], "F2 from 1", "F3 to 0"),
        ("B0.1", ["B2 from 0"], "B2 from 0", "B1 to 1"),
        ("W0.1", [], None, None),
        ("B0", [], "B1 from 1", "B0 to 0"),
        ("W0", [], None, None),
    ]


def test_a_table_that_cannot_run_has_no_plan() -> None:
    rows = make_table("1f1b", 2, 1, 2).actions[0], make_table("gpipe", 2, 1, 2).actions[1]
    fine = Table("own", StageLayout(2), 2, rows)
    assert len(make_plan(fine, 0)) == 4
    with pytest.raises(ScheduleError, match=r"^rank 1: lacks B0, F1, B1\."):
        make_plan(replace(fine, actions=(rows[0], rows[1][:1])), 0)


# -- following it


class _Channel:
    """Messages in the order in which they were sent, and receives in the order in which they were begun."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.begun: list[Message] = []


Ready = Callable[[], bool]


def _longer(messages: list[Message], place: int) -> Ready:
    """Whether there is one at ``place``."""
    return lambda: len(messages) > place


class _Ranks:
    """Ranks that follow plans, each in its own time. The strictest of senders: it goes on when its message has a
    buffer, not before, and the n-th message of a channel gets the n-th buffer."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._channels: defaultdict[tuple[int, int], _Channel] = defaultdict(_Channel)
        self._ranks = {rank: self._follow(rank, plan) for rank, plan in enumerate(plans)}

    def run(self, dice: random.Random) -> list[int]:
        """The ranks that don't come to their end."""
        waiting: dict[int, Ready] = dict.fromkeys(self._ranks, lambda: True)
        while able := [rank for rank, ready in waiting.items() if ready()]:
            rank = dice.choice(able)
            del waiting[rank]
            for ready in self._ranks[rank]:
                waiting[rank] = ready
                break
        return sorted(waiting)

    def _follow(self, rank: int, plan: Plan) -> Generator[Ready, None, None]:
        """Yields what has to hold before it can go on."""
        at_hand: set[Message] = set()
        for step in plan:
            for source, message, _ in step.receives:
                self._channels[source, rank].begun.append(message)
            if step.input and step.source == rank:
                at_hand.remove(step.input)
            elif step.input:
                channel = self._channels[step.source, rank]
                place = channel.begun.index(step.input)
                yield _longer(channel.sent, place)
                assert channel.sent[place] == step.input, "the buffer of another message"
            yield lambda: True  # it computes, and others may go on meanwhile
            if step.output and step.target == rank:
                at_hand.add(step.output)
            elif step.output:
                channel = self._channels[rank, step.target]
                channel.sent.append(step.output)
                place = len(channel.sent) - 1
                yield _longer(channel.begun, place)
                assert channel.begun[place] == step.output, "the buffer of another message"
        assert not at_hand


@given(tables() | own_tables(), st.integers())
def test_ranks_that_follow_their_plans_come_to_an_end(table: Table, seed: int) -> None:
    assert _Ranks(plans_of(table)).run(random.Random(seed)) == []


@given(tables(), st.integers())
def test_so_they_do_in_validation(table: Table, seed: int) -> None:
    assert _Ranks(plans_of(table.forward_only())).run(random.Random(seed)) == []


@pytest.mark.parametrize(
    ("schedule", "chunks", "stuck"),
    [("1f1b", 1, [0, 1, 2]), ("zbh1", 1, [0, 1, 2]), ("gpipe", 1, []), ("zbv", 2, [0, 1, 2])],
)
def test_buffers_that_are_offered_when_needed_are_too_late(schedule: str, chunks: int, stuck: list[int]) -> None:
    """Two neighbours that send to one another before they take wait forever, but in GPipe, where none does."""
    plans = []
    for plan in plans_of(make_table(schedule, 3, chunks, 6)):
        begins = {receive.message: receive for step in plan for receive in step.receives}
        plans.append([replace(step, receives=tuple(b for m, b in begins.items() if m == step.input)) for step in plan])
    assert _Ranks(plans).run(random.Random(0)) == stuck
