"""The pictures in the documentation are current, and those of the parallel modes show all traffic of a block."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from internlm.config import load_config
from internlm.core.scheduler.table import SCHEDULES
from internlm.costs import ParamInventory, block
from internlm.train import build_inventory
from tools import draw_schedules
from tools.draw_parallel import MODES, picture

FOLDER = Path(__file__).parents[2] / "doc" / "pictures"
SCHEDULE_PICTURES = FOLDER / "schedules"


def inventory(mode: str) -> ParamInventory:
    """Parameters of a model on two ranks, over which everything is split that ``mode`` splits."""
    model = dict(num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=128)
    sizes = dict(tensor=dict(mode=mode, size=2), weight=dict(size=2 if mode == "isp" else 1))
    data = dict(seq_len=64, micro_bsz=1, total_steps=1)
    sections = dict(model=model, data=data, adam=dict(lr=1e-4), parallel=sizes)
    return build_inventory(load_config(dict(model_type="LLAMA2", **sections), world_size=2, device_type="cpu"), 2)


def arrow_labels(mode: str) -> Counter[str]:
    """Labels of the arrows in a picture."""
    root = ElementTree.fromstring((FOLDER / f"{mode}.svg").read_bytes())
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    collectives = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    return Counter(word for word in words if word.endswith(collectives))


def test_there_is_a_picture_of_each_mode() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {f"{mode}.svg" for mode in MODES}


def test_there_is_a_picture_of_each_schedule() -> None:
    assert {path.name for path in SCHEDULE_PICTURES.iterdir()} == {f"{schedule}.svg" for schedule in SCHEDULES}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_picture_of_the_schedule_is_current(schedule: str) -> None:
    file = (SCHEDULE_PICTURES / f"{schedule}.svg").read_text(encoding="utf-8")
    assert file == draw_schedules.picture(schedule), "run: python tools/draw_schedules.py --out doc/pictures/schedules"


@pytest.mark.parametrize("mode", MODES)
def test_the_picture_is_current(mode: str) -> None:
    file = (FOLDER / f"{mode}.svg").read_text(encoding="utf-8")
    assert file == picture(mode), "run: python tools/draw_parallel.py --out doc/pictures"


@pytest.mark.parametrize("mode", MODES)
def test_the_picture_has_every_collective_of_a_block_and_no_other(mode: str) -> None:
    parameters = inventory(mode)
    traffic = block(parameters.symbols, 0)
    expected = Counter(f"forward: {call.collective}" for call in traffic.forward)
    expected += Counter(f"backward: {call.collective}" for call in traffic.backward)
    norms_are_summed = any(group.partial_over for group in parameters.param_groups)
    expected += Counter({"step: all-reduce": 2 * norms_are_summed})
    assert arrow_labels(mode) == expected
