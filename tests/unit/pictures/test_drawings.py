"""Timelines as SVG, as a page and as a Chrome trace hold every action once."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from internlm.core.scheduler.actions import BACKWARD, FORWARD
from internlm.core.scheduler.timeline import Timeline
from internlm.pictures import chrome_trace, html, svg
from tests.unit.pictures.samples import simulated, slower

SVG = "{http://www.w3.org/2000/svg}"
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zbh1", 1), ("zbv", 2)]


def pair(schedule: str, chunks: int) -> list[tuple[str, Timeline]]:
    timeline = simulated(schedule, chunks=chunks)
    return [("simulated", timeline), ("<measured>", slower(timeline, 1.5))]


def expected(timelines: list[tuple[str, Timeline]]) -> Counter[tuple[str, str]]:
    """(action, rank) of all that is to be drawn."""
    rows = [each for _, timeline in timelines for each in enumerate(timeline.table.actions)]
    return Counter((str(action), str(rank)) for rank, row in rows for action in row)


def named(titles: list[str]) -> Counter[tuple[str, str]]:
    """(action, rank) of tooltips."""
    return Counter(re.fullmatch(r"(\S+): .* rank (\d+).*; .* to .*", title).groups() for title in titles)  # type: ignore[union-attr,misc]


class Page(HTMLParser):
    """Collects tooltips, and checks that every tag is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.addresses: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        """Nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["g", "title"]:
            self.titles.append(data)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_svg(schedule: str, chunks: int) -> None:
    timelines = pair(schedule, chunks)
    root = ElementTree.fromstring(svg(timelines))
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == "action"]
    assert named([group.findtext(f"{SVG}title", "") for group in groups]) == expected(timelines)
    words = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert any(word.startswith(f"simulated: {schedule}, 4 stages") for word in words)
    assert any(word.startswith(f"<measured>: {schedule}, 4 stages") for word in words)
    assert sum(word.startswith("bubble ") for word in words) == 2


def test_cells_lie_where_their_actions_do() -> None:
    timeline = simulated("zbv", chunks=2)
    timelines = [("simulated", timeline), ("measured", slower(timeline, 1.5))]
    root = ElementTree.fromstring(svg(timelines))
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == "action"]
    boxes = [group.find(f"{SVG}rect") for group in groups]
    places = [(float(box.get("x", "")), float(box.get("width", ""))) for box in boxes if box is not None]
    spans = [span for _, each in timelines for row in each.spans for span in row]
    left, scale = places[0][0], places[0][1]  # the first action starts at 0 and takes a unit of time
    for (x, wide), span in zip(places, spans, strict=True):
        assert x == pytest.approx(left + span.start * scale, abs=0.6)
        assert wide == pytest.approx((span.end - span.start) * scale, abs=0.6)


def test_no_label_is_wider_than_its_cell() -> None:
    root = ElementTree.fromstring(svg([("", simulated("zbv", chunks=2, micro_batches=120, weight=0.3))]))
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == "action"]
    shown = [(group.findtext(f"{SVG}text", ""), group.find(f"{SVG}rect")) for group in groups]
    assert {bool(label) for label, _ in shown} >= {True}
    assert all(7 * len(label) <= float(box.get("width", "")) for label, box in shown if box is not None)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_html(schedule: str, chunks: int) -> None:
    timelines = pair(schedule, chunks)
    page = Page(html(timelines))
    assert page.open == []
    assert page.addresses == []
    assert named(page.titles) == expected(timelines)


def events(timelines: list[tuple[str, Timeline]], phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(chrome_trace(timelines))["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_chrome_trace_has_a_complete_event_for_each_action(schedule: str, chunks: int) -> None:
    timelines = pair(schedule, chunks)
    complete = events(timelines, "X")
    assert Counter((event["name"], str(event["tid"])) for event in complete) == expected(timelines)
    for number, (_, timeline) in enumerate(timelines):
        for rank, row in enumerate(timeline.spans):
            own = [event for event in complete if (event["pid"], event["tid"]) == (number, rank)]
            assert [event["ts"] for event in own] == pytest.approx([span.start * 1e6 for span in row])
            assert all(one["ts"] + one["dur"] <= other["ts"] + 1e-3 for one, other in pairwise(own))
    names = [event["args"]["name"] for event in events(timelines, "M")]
    assert names.count("rank 3") == 2
    assert names[0].startswith(f"simulated: {schedule}")


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_chrome_trace_has_an_arrow_for_each_transfer(schedule: str, chunks: int) -> None:
    timelines = pair(schedule, chunks)
    begun = {event["id"]: event for event in events(timelines, "s")}
    ended = {event["id"]: event for event in events(timelines, "f")}
    turns = (chunks - 1) if schedule == "zbv" else 0  # where a V turns, nothing is sent
    assert len(begun) == 2 * 2 * 8 * (4 * chunks - 1 - turns)  # timelines, F and B, micro-batches, cuts
    assert begun.keys() == ended.keys()
    for number, event in begun.items():
        assert event["ts"] <= ended[number]["ts"] + 1e-3
        assert abs(event["tid"] - ended[number]["tid"]) in (1, 3)


def test_tooltips_say_what_and_when() -> None:
    page = Page(html([("", simulated("zbv", chunks=2))]))
    first, *_ = page.titles
    assert first == "F0: forward of micro-batch 0, rank 0, chunk 0 (virtual stage 0); 0 to 1 (takes 1)"
    assert {title[0] for title in page.titles} == {FORWARD, BACKWARD, "W"}
