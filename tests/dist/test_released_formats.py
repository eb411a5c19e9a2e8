"""Checkpoints of each released format still load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from internlm.checkpoint.manifest import FORMAT
from tests.dist.whole_runs import resume, saving
from tests.fixtures.released_formats import CHECKPOINTS, EXPECTED, OVERRIDES, STEP, digest

FORMATS = sorted(path.name for path in CHECKPOINTS.iterdir())


def test_the_present_format_is_kept_and_all_before() -> None:
    assert [f"format-{version}" for version in range(1, FORMAT + 1)] == FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_a_released_format_loads_in_another_layout(name: str, tmp_path: Path) -> None:
    """One rank loads what two saved, compared with what other code found in the files."""
    expected = json.loads((CHECKPOINTS / name / EXPECTED).read_text())
    shutil.copytree(CHECKPOINTS / name / f"step-{STEP}", tmp_path / "ckpts" / f"step-{STEP}")
    # Formats 1 and 2 were written when samples had another order.
    loaded = resume(1, saving(tmp_path, *OVERRIDES, "ckpt.allow_data_changes=True"))
    assert loaded.message == f"resumed from {tmp_path}/ckpts/step-{STEP} at step {STEP}"
    (rank,) = loaded.ranks
    tensors = {key: value for key, value in expected["tensors"].items() if not key.startswith("rng/")}
    assert {key: digest(tensor) for key, tensor in loaded.tensors.items()} == tensors
    streams = sorted(key for key in expected["tensors"] if key.startswith("rng/"))
    for stream, state in rank.streams.items():
        of_rank_0 = next(key for key in streams if key.endswith(f"/{stream}"))
        assert digest(state) == expected["tensors"][of_rank_0]
    assert (rank.state, rank.optimizer) == (expected["train_state"], expected["optimizer"])
    assert list(rank.position[:3]) == expected["sampler"]
