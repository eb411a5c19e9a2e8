"""Checkpoints of each released format still load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.dist.whole_runs import resume, saving
from tests.fixtures.released_formats import CHECKPOINTS, EXPECTED, OVERRIDES, STEP, digest

FORMATS = sorted(path.name for path in CHECKPOINTS.iterdir())


def test_the_first_format_is_kept() -> None:
    assert "format-1" in FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_a_released_format_loads_in_another_layout(name: str, tmp_path: Path) -> None:
    """One rank loads what two saved, compared with what torch's own reader found in the files."""
    expected = json.loads((CHECKPOINTS / name / EXPECTED).read_text())
    shutil.copytree(CHECKPOINTS / name / f"step-{STEP}", tmp_path / "ckpts" / f"step-{STEP}")
    loaded = resume(1, saving(tmp_path, *OVERRIDES))
    assert loaded.message == f"resumed from {tmp_path}/ckpts/step-{STEP} at step {STEP}"
    (rank,) = loaded.ranks
    found = {**loaded.tensors, **{f"rng/0/{stream}": state for stream, state in rank.streams.items()}}
    of_other_ranks = {key for key in expected["tensors"] if key.startswith("rng/1/")}
    assert found.keys() == expected["tensors"].keys() - of_other_ranks
    assert {key: digest(tensor) for key, tensor in found.items()}.items() <= expected["tensors"].items()
    assert (rank.state, rank.optimizer) == (expected["train_state"], expected["optimizer"])
    assert list(rank.position) == expected["sampler"]
