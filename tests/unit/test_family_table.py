"""The README's table of model families: each has a row, and each cell a test that runs with the family."""

from __future__ import annotations

import importlib
import itertools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm.config.families import FAMILIES
from internlm.model.hf_config import FORMAT_OF, FORMATS

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Model families\n")[1]
HEADER, _, *LINES = ([cell.strip() for cell in row.split("|")[1:-1]] for row in SECTION.splitlines() if row[:1] == "|")
#: Cells by column, of each row by its families.
TABLE = {tuple(re.findall(r"`(\w+)`", line[0])): dict(zip(HEADER[1:], line[1:], strict=True)) for line in LINES}
#: Test that backs a word, by the list under the table.
TESTS = {
    word: test
    for words, test in re.findall(r"^- (.+?): .*\(`(tests/[\w/]+\.py::\w+)`", SECTION, re.MULTILINE)
    for word in re.findall(r"\*([\w ]+)\*", words)
}


def _rows(test: str) -> Iterator[tuple[Any, ...]]:
    """Values of each row of a parametrized test."""
    path, name = test.split("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    marks = [mark for mark in getattr(module, name).pytestmark if mark.name == "parametrize"]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        row = itertools.chain.from_iterable(
            getattr(value, "values", value) if isinstance(value, tuple) else [value] for value in values
        )
        yield tuple(
            getattr(module, "CASES", {}).get(value, [value])[0] if isinstance(value, str) else value for value in row
        )


def _families(test: str, layout: str | None = None) -> set[str]:
    """Families that a test runs with, in a ``layout``; those of config files are the ``model_type`` in these."""
    found = set()
    for row in _rows(test):
        if layout is None or layout in row:
            found |= {value for value in row if isinstance(value, str)}
            found |= {runpy.run_path(str(value))["model_type"] for value in row if isinstance(value, Path)}
    return found & {*FAMILIES}


def test_every_family_has_one_row() -> None:
    assert sorted(family for families in TABLE for family in families) == sorted(FAMILIES)
    # One row only for names of one family: a test with one of them is a test of all.
    assert all(FAMILIES[name] is FAMILIES[families[0]] for families in TABLE for name in families)


@pytest.mark.parametrize("column", HEADER[1:])
def test_every_cell_has_a_test_with_the_family(column: str) -> None:
    claims = {families: set(cells[column].split(", ")) for families, cells in TABLE.items()}
    if column == "parallel modes":
        for layout in set.union(*claims.values()):
            tested = _families(TESTS[column], layout)
            assert all(tested & {*families} for families, words in claims.items() if layout in words), layout
        return
    tested, by_formula = _families(TESTS[column]), _families(TESTS["formula"])
    for families, words in claims.items():
        assert tested >= {*families}
        theirs = {FORMATS[FORMAT_OF[family]].architecture.removesuffix("ForCausalLM") for family in families}
        assert theirs == words - {"formula"}
        assert "formula" not in words or by_formula & {*families}


def test_a_family_is_found_only_where_it_is_tested() -> None:
    assert _families(TESTS["formula"]) == {"INTERNLM", "INTERNLM2", "BAICHUAN2"}
    assert not _families(TESTS["parallel modes"], "no layout")
