"""Timelines as text."""

from __future__ import annotations

import re

import pytest

from internlm.pictures import text
from tests.unit.pictures.samples import simulated, slower

SMALL = """\
1f1b, 2 stages, 3 micro-batches; bubble 25.0 %, end 12

time    0              5              10
rank 0  F0 F1       B0--- F2 B1---    B2---
rank 1     F0 B0--- F1 B1--- F2 B2---

rank  busy  idle  in flight at most
   0     9     3                  2
   1     9     3                  1

F forward, B backward. F3: micro-batch 3.
"""


def drawn(block: str) -> list[str]:
    return re.findall(r"[FBWfbw]\d+", block)


def test_a_small_timeline() -> None:
    assert text([("", simulated("1f1b", stages=2, micro_batches=3))], width=80) == SMALL


@pytest.mark.parametrize("width", [200, 120, 80, 40, 10])
@pytest.mark.parametrize(
    ("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zbh1", 1), ("zbv", 2)]
)
def test_every_action_is_shown_once_whatever_the_width(schedule: str, chunks: int, width: int) -> None:
    timeline = simulated(schedule, chunks=chunks, micro_batches=12)
    lines = text([("", timeline)], width=width).splitlines()
    for rank, actions in enumerate(timeline.table.actions):
        shown = [name for line in lines if line.startswith(f"rank {rank}  ") for name in drawn(line)]
        named = [(a.type.lower() if a.chunk else a.type) + str(a.micro_batch) for a in actions]
        assert shown == named


@pytest.mark.parametrize("width", [120, 80, 40])
def test_rows_are_no_longer_than_the_width(width: int) -> None:
    lines = text([("", simulated("zbv", chunks=2, micro_batches=12))], width=width).splitlines()
    rows = [line for line in lines if line.startswith("rank ") and not line.startswith("rank  ")]
    assert len(rows) >= 4
    assert max(map(len, rows)) <= width


def test_chunks_are_told_apart() -> None:
    two = text([("", simulated("interleaved", stages=2, chunks=2, micro_batches=2))])
    assert "F0F1f0f1" in two.replace(" ", "")
    assert "f3: chunk 1" in two
    three = text([("", simulated("interleaved", stages=2, chunks=3, micro_batches=2))])
    assert all(name in three for name in ("F0-- F1-- ", "F1.1", "F1.2", "F3.1: chunk 1"))


def test_colours_change_no_character() -> None:
    timelines = [("", simulated("zbv", chunks=2))]
    coloured = text(timelines, coloured=True)
    assert coloured.count("\x1b[38") == coloured.count("\x1b[0m") > 0
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text(timelines)


def test_what_is_too_short_for_its_number_keeps_its_letter() -> None:
    lines = text([("", simulated("zbh1", stages=1, micro_batches=1, weight=1 / 20))]).splitlines()
    (row,) = (line for line in lines if line.startswith("rank 0 "))
    assert drawn(row) == ["F0", "B0"]
    assert row.endswith("W")


def test_two_timelines_share_the_axis() -> None:
    one = simulated("1f1b", stages=2, micro_batches=3)
    both = text([("simulated", one), ("measured", slower(one, 2))])
    assert "simulated: 1f1b, 2 stages, 3 micro-batches; bubble 25.0 %, end 12" in both
    assert "measured: 1f1b, 2 stages, 3 micro-batches; bubble 25.0 %, end 24" in both
    assert "rank 0  F0 F1 " in both
    assert "rank 0  F0--- F1---" in both


@pytest.mark.parametrize(("second", "end"), [(1.0, "end 12 s"), (1e-3, "end 12 ms"), (1e-5, "end 120 µs")])
def test_seconds_are_written_in_a_fitting_unit(second: float, end: str) -> None:
    timeline = slower(simulated("1f1b", stages=2, micro_batches=3), second)
    assert end in text([("", timeline)], seconds=True)
