"""The pictures of the parallel modes are true, and those that the script draws."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from internlm.train.traffic import TABLE

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "doc" / "pictures"
MODES = ("mtp", "msp", "fsp", "isp")
ROLES = ("column", "row", "attention")  # of what lies within a block


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import draw_parallel
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return {mode: draw_parallel.picture(mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_the_files_are_what_the_script_draws(mode: str, drawn: dict[str, str]) -> None:
    assert (PICTURES / f"{mode}.svg").read_text().rstrip("\n") == drawn[mode].rstrip("\n")


@pytest.mark.parametrize("mode", MODES)
def test_every_collective_of_a_block_is_shown(mode: str, drawn: dict[str, str]) -> None:
    texts = " ".join(ElementTree.fromstring(drawn[mode]).itertext())
    spoken = {each for role in ROLES for way in TABLE.get((mode, role), ()) for each in way}
    assert spoken
    assert all(each in texts for each in spoken)
    assert not [each for each in ("all-reduce", "all-to-all") if each in texts and each not in {*spoken, "all-reduce"}]
