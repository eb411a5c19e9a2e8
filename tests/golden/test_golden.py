"""Losses that only a change of numbers may change: then ``python tools/loss_compare.py --update``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.integration.jobs import debug_losses
from tools import loss_compare
from tools.loss_compare import Difference, first_difference

NAMES = sorted(path.stem for path in loss_compare.CONFIGS.glob("*.py"))


#: The others differ from these in the maths of a layer, which tests/unit/model compares with ``transformers``.
ALWAYS = {"internlm", "internlm2", "llama2", "gemma3"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.wide]) for name in NAMES]
)
def test_golden_losses(name: str) -> None:
    """Equal bit by bit where they were recorded on this kind of machine, else nearly so."""
    difference = loss_compare.golden_difference(dict(enumerate(debug_losses(name, 1))), name)
    assert difference is None, difference


def test_there_is_no_other_record() -> None:
    assert sorted(path.stem for path in loss_compare.GOLDEN.glob("*.json")) == NAMES


NAN = math.nan


@pytest.mark.parametrize(
    ("one", "other", "relative", "expected"),
    [
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, 0.0, None),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0 + 1e-15, 2: 4.0}, 0.0, Difference(1, 2.0, 2.0 + 1e-15)),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0 + 1e-6}, 1e-5, None),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0 + 1e-3}, 1e-5, Difference(1, 2.0, 2.0 + 1e-3)),
        ({0: NAN}, {0: NAN}, 0.0, None),
        ({0: NAN}, {0: 1.0}, 1e-5, Difference(0, NAN, 1.0)),
    ],
)
def test_first_difference(
    one: dict[int, float], other: dict[int, float], relative: float, expected: Difference | None
) -> None:
    assert repr(first_difference(one, other, relative)) == repr(expected)


def test_a_missing_step_is_a_difference() -> None:
    assert repr(first_difference({0: 1.0, 1: 2.0}, {0: 1.0})) == repr(Difference(1, 2.0, NAN))


def _metrics(folder: Path, losses: dict[int, float]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 1, "valid/loss": 7.0})]))
    return folder


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = _metrics(tmp_path / "one", {0: 1.0, 1: 2.0}), _metrics(tmp_path / "other", {0: 1.0, 1: 2.5})
    assert loss_compare.main([str(one), str(other / "metrics.jsonl")]) == 1
    assert loss_compare.main([str(one), str(one)]) == 0
    assert capsys.readouterr().out == "step 1: 2.0 and 2.5\nequal\n"


def test_two_files_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    for name in ("one", "other"):
        _metrics(tmp_path / name, {0: 1.0})
    with pytest.raises(SystemExit, match=r"holds 2 files metrics\.jsonl"):
        loss_compare.read_losses(tmp_path)


def test_what_is_recorded_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_compare, "GOLDEN", tmp_path)
    loss_compare.record({1: 0.1 + 0.2, 0: 1 / 3}, "new")
    assert loss_compare.golden_difference({0: 1 / 3, 1: 0.1 + 0.2}, "new") is None
    assert loss_compare.golden_difference({0: 1 / 3, 1: 0.3}, "new") == Difference(1, 0.3, 0.1 + 0.2)


def test_elsewhere_the_last_bits_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_compare, "GOLDEN", tmp_path)
    content = {"machine": {**loss_compare.machine(), "torch": "1.0"}, "losses": [1.0]}
    (tmp_path / "new.json").write_text(json.dumps(content))
    assert loss_compare.golden_difference({0: 1.0 + 1e-6}, "new") is None
    assert loss_compare.golden_difference({0: 1.0 + 1e-4}, "new") == Difference(0, 1.0 + 1e-4, 1.0)
