"""The blend of datasets: shares of the tokens, random access, epochs, and a mixture that changes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data import blend
from internlm.data.blend import Blend, Dataset, Mark, Phase
from internlm.data.order import Piece
from internlm.utils.errors import DataError


@pytest.fixture(autouse=True)
def short_blocks() -> Iterator[None]:
    """Blocks of eight items, so that sequences have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "BLOCK", 8)
        yield


@st.composite
def blends(draw: st.DrawFn, **settings: Any) -> tuple[Blend, np.ndarray, list[np.ndarray], list[Phase]]:
    """Draw a blend with the lengths of all items, the items of each dataset, and the phases."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    lengths = np.array(draw(st.lists(st.integers(1, 30), min_size=sum(sizes), max_size=sum(sizes))))
    members = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    by_items = draw(st.booleans())
    begins = sorted(draw(st.sets(st.integers(1, 100), max_size=2)))
    phases = [Phase(begin, draw(weights_of(len(sizes)))) for begin in (0, *begins)]
    datasets = [Dataset(f"d{i}", items) for i, items in enumerate(members)]
    made = Blend(datasets, lengths, None, draw(st.integers(0, 5)), by_items)
    made.start(at_start(len(sizes)), phases)
    return made, lengths, members, phases


def at_start(count: int) -> Mark:
    return Mark(0, 0, 0, 0, (0,) * count, (0,) * count)


@st.composite
def weights_of(draw: st.DrawFn, count: int) -> tuple[float, ...]:
    parts = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count).filter(any))
    return tuple(part / sum(parts) for part in parts)


def items(made: Blend, count: int) -> list[int]:
    return [piece.sample for piece in made.samples(0, count)]


@given(blends())
def test_tokens_of_each_dataset_differ_from_its_share_by_at_most_one_sample(drawn: Any) -> None:
    made, lengths, members, phases = drawn
    owner = {int(item): number for number, of_dataset in enumerate(members) for item in of_dataset}
    served, total, phase, position, longest = np.zeros(len(members)), 0, 0, 0, lengths.max()
    for count, item in enumerate(items(made, 150)):
        place = count if made.by_items else position
        while phase + 1 < len(phases) and place >= phases[phase + 1].begin:
            served[:], total, phase = 0, 0, phase + 1
        served[owner[item]] += lengths[item]
        total += lengths[item]
        position += lengths[item]
        assert (abs(served - np.array(phases[phase].weights) * total) <= longest).all()
    assert phase == len(phases) - 1


@given(blends(), st.integers(0, 120), st.integers(1, 60))
def test_any_part_is_that_of_the_whole_sequence(drawn: Any, start: int, size: int) -> None:
    made, lengths, _, _ = drawn
    sequence = items(made, 200)
    whole = [(item, token) for item in sequence for token in range(lengths[item])]
    again = Blend(made.datasets, lengths, None, made._seed, made.by_items)
    again.start(at_start(len(made.datasets)), drawn[3])
    pieces = again.between(start, start + size)
    assert [(p.sample, token) for p in pieces for token in range(p.begin, p.stop)] == whole[start : start + size]
    assert again.samples(start // 2, start // 2 + 9) == [
        Piece(item, int(lengths[item]), 0, int(lengths[item])) for item in sequence[start // 2 : start // 2 + 9]
    ]


@given(blends(), st.lists(st.integers(0, 120), max_size=3))
def test_a_sequence_goes_on_from_a_mark(drawn: Any, places: list[int]) -> None:
    """Three times in a row, as a run that is resumed from a checkpoint of a resumed run."""
    made, lengths, _, _ = drawn
    expected_pieces, expected_items = made.between(0, 200), made.samples(0, 130)
    for place in sorted(places):
        mark = made.mark_at(place)
        assert (mark.item if made.by_items else mark.token) <= place
        made = Blend(made.datasets, lengths, None, made._seed, made.by_items)
        made.start(mark, drawn[3])
        if made.by_items:
            assert made.samples(place, place + 10) == expected_items[place : place + 10]
        else:
            rest = made.between(place, 200)
            tokens = [(p.sample, t) for p in expected_pieces for t in range(p.begin, p.stop)]
            assert [(p.sample, t) for p in rest for t in range(p.begin, p.stop)] == tokens[place:]


@pytest.mark.parametrize("by_items", [False, True])
def test_marks_of_a_long_sequence_stay_few(by_items: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "MOST_MARKS", 32)
    monkeypatch.setattr(blend, "RECENT_MARKS", 4)
    lengths = np.random.default_rng(0).integers(1, 30, 24)
    made = Blend([Dataset("en", np.arange(9)), Dataset("code", np.arange(9, 24))], lengths, None, 0, by_items)
    made.start(at_start(2), [Phase(0, (0.3, 0.7)), Phase(5000, (0.6, 0.4))])
    sequence = []
    for first in range(0, 8 * 500, 8):
        sequence += made.samples(first, first + 8)
        assert len(made._marks) <= 32
    assert made._spacing == 32  # 500 blocks of 8 items
    whole = [(piece.sample, token) for piece in sequence for token in range(piece.length)]
    for first in np.random.default_rng(1).integers(0, 3900, 40).tolist():
        assert made.samples(first, first + 20) == sequence[first : first + 20]
        tokens = [(p.sample, token) for p in made.between(first, first + 50) for token in range(p.begin, p.stop)]
        assert tokens == whole[first : first + 50]
        mark = made.mark_at(first)
        assert sum(mark.used) == mark.item
        assert mark.token == sum(piece.length for piece in sequence[: mark.item])
        assert len(made._marks) <= 32


@given(blends())
def test_an_epoch_of_a_dataset_has_each_item_once(drawn: Any) -> None:
    made, _, members, _ = drawn
    sequence = items(made, 100)
    for of_dataset in members:
        mine = [item for item in sequence if item in set(of_dataset.tolist())]
        size = len(of_dataset)
        for first in range(0, len(mine) - size, size):
            assert sorted(mine[first : first + size]) == of_dataset.tolist()


def test_a_dataset_that_is_used_up_is_named() -> None:
    datasets = [Dataset("en", np.arange(4)), Dataset("code", np.arange(4, 6), max_epochs=1.5)]
    made = Blend(datasets, np.full(6, 10), None, 0, by_items=True)
    made.start(at_start(2), [Phase(0, (0.5, 0.5))])
    counts = [sum(item >= 4 for item in items(made, count)) for count in (2, 4, 6)]
    assert counts == [1, 2, 3]
    # One more than 1.5 epochs, since the estimate that a run is refused by is not exact.
    with pytest.raises(DataError, match=r"^data.max_epochs: 1.5 for 'code' are used up after 4 of its samples\. Allow"):
        made.samples(0, 10)


def test_any_finite_number_of_epochs_may_be_allowed() -> None:
    made = Blend([Dataset("en", np.arange(4), max_epochs=1e308)], np.full(4, 10), None, 0, by_items=True)
    made.start(at_start(1), [Phase(0, (1.0,))])
    assert len(items(made, 9)) == 9


def test_items_are_truncated() -> None:
    made = Blend([Dataset("en", np.arange(2))], np.array([3, 9]), 5, 0, by_items=True)
    made.start(at_start(1), [Phase(0, (1.0,))])
    assert sorted(piece.length for piece in islice(made.samples(0, 2), 2)) == [3, 5]
