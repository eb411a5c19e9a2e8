"""The mistakes that ``tools/mutate.py`` plants fit the code."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest

from tools.mutate import MISTAKES, ROOT, TO_NAME, Mistake

ALL = tuple(dict.fromkeys((*MISTAKES, *TO_NAME)))


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: mistake.name)
def test_a_mistake_can_be_planted_in_one_place(mistake: Mistake) -> None:
    source = (ROOT / "internlm" / mistake.file).read_text()
    assert source.count(mistake.old) == 1
    ast.parse(source.replace(mistake.old, mistake.new))  # it must fail by what it computes
    assert mistake.new != mistake.old


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_tests_that_must_catch_it_are_there(mistake: Mistake) -> None:
    assert (ROOT / mistake.tests[0]).exists()


@pytest.mark.parametrize("mistake", TO_NAME, ids=lambda mistake: mistake.name)
def test_what_must_be_named_is_said(mistake: Mistake) -> None:
    assert mistake.verify
    assert re.compile(mistake.module).pattern
    assert (ROOT / mistake.config).exists()


def test_at_least_forty_are_to_be_named() -> None:
    assert len(TO_NAME) >= 40


def test_every_mistake_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(mistake.name for mistake in ALL).items() if count > 1] == []
