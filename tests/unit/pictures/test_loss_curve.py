"""The picture of a run's losses."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest

from internlm.pictures import loss_curve

SVG = "{http://www.w3.org/2000/svg}"
TRAINED = [(step, 8.0 / (step + 1)) for step in range(20)]
LEVEL = ("unigram entropy", 5.0)


def drawn(*arguments: object) -> ElementTree.Element:
    return ElementTree.fromstring(loss_curve(*arguments))  # type: ignore[arg-type]


def polylines(picture: ElementTree.Element) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]  # type: ignore[misc]
        for line in picture.iter(f"{SVG}polyline")
    ]


def test_it_is_well_formed_and_names_what_it_shows() -> None:
    picture = drawn("Loss of <demo> & co", {"training": TRAINED}, {"validation": [(9, 2.0), (19, 1.0)]}, LEVEL)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"Loss of <demo> & co", "training", "validation", "unigram entropy", "step"} <= set(texts)
    assert len(list(picture.iter(f"{SVG}circle"))) == 2 + 1  # two validations, one in the legend


def test_every_step_has_a_point_within_the_picture_and_falling_losses_go_down() -> None:
    raw, smooth = polylines(drawn("Loss", {"training": TRAINED}, {}, LEVEL))
    assert len(raw) == len(smooth) == len(TRAINED)
    assert all(0 < x < 760 and 0 < y < 420 for x, y in [*raw, *smooth])
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(raw))  # y grows downwards


def test_the_smoothed_line_starts_at_the_first_loss_and_keeps_a_constant() -> None:
    raw, smooth = polylines(drawn("Loss", {"training": [(step, 3.0) for step in range(9)]}, {}, LEVEL))
    assert smooth == raw


def test_losses_that_are_not_finite_are_left_out() -> None:
    raw, _ = polylines(drawn("Loss", {"training": [*TRAINED, (20, math.nan), (21, math.inf)]}, {}, LEVEL))
    assert len(raw) == len(TRAINED)


def test_one_step_can_be_drawn() -> None:
    raw, _ = polylines(drawn("Loss", {"training": [(0, 5.0)]}, {}, LEVEL))
    assert len(raw) == 1


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one finite loss"):
        loss_curve("Loss", {"training": [(0, math.nan)]}, {}, LEVEL)
