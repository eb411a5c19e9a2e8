"""CPU kernels of a job: one choice for each type of processor, which checkpoints store and a resumed run uses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from internlm.accelerator import processor
from internlm.ops.cpu import kernel_choice, kernel_start
from internlm.ops.cpu.kernel_choice import CASES, KERNELS, forced, to_plain
from tests.dist.whole_runs import _resume, fit, saving
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.samples import rewrite_state

Tables = tuple[dict[str, str], dict[str, dict[str, str]]]


def _kernels(index: int) -> dict[str, str]:
    """Return the table in which every case has its first kernel, or its second."""
    return to_plain({case: KERNELS[case[:2]][index] for case in CASES})


def _choose(rank: int, world_size: int, types: list[str], folder: Path) -> tuple[Tables, bool]:
    """Choose kernels where every rank would measure others; return those of the rank and of the job, and if it did."""
    del os.environ[processor.KERNELS_VARIABLE]
    os.environ[processor.CACHE_VARIABLE] = str(folder / str(rank))  # as if each were on a machine of its own
    measured = {case: KERNELS[case[:2]][rank] for case in CASES}
    with (
        patch.object(kernel_start, "measure", lambda table, dtype: measured),
        patch.object(processor, "processor_type", lambda: types[rank]),
    ):
        kernel_start.choose_kernels(torch.float32)
    chosen = to_plain(kernel_choice.current()), kernel_start.kernels_of_job()
    kernel_choice.install(None)  # the pool's process serves other tests
    return chosen, (folder / str(rank)).exists()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("types", "by_rank"), [(["a", "a"], [0, 0]), (["b", "a"], [0, 1])])
def test_the_first_rank_of_a_type_of_processor_chooses_for_all_of_them(
    types: list[str], by_rank: list[int], tmp_path: Path
) -> None:
    of_job = {name: _kernels(rank) for name, rank in zip(types, by_rank, strict=True)}
    expected = [((_kernels(leader), of_job), leader == rank) for rank, leader in enumerate(by_rank)]
    assert run_ranks(2, _choose, types, tmp_path) == expected


def _kernels_after_resuming(rank: int, world_size: int, overrides: tuple[str, ...]) -> Tables:
    os.environ[processor.KERNELS_VARIABLE] = "rule"
    _resume(rank, world_size, overrides)
    resumed = to_plain(kernel_choice.current()), kernel_start.kernels_of_job()
    kernel_choice.install(None)
    return resumed


def test_a_resumed_run_has_the_kernels_that_its_checkpoint_stores(tmp_path: Path) -> None:
    overrides = saving(tmp_path)
    fit(1, overrides, 2)
    path, own_type = tmp_path / "ckpts" / "step-2" / "state.json", processor.processor_type()
    state = json.loads(path.read_text())
    assert state["cpu_kernels"] == {own_type: to_plain(forced(os.environ[processor.KERNELS_VARIABLE]))}
    state["cpu_kernels"][own_type] = _kernels(1)  # not what the rule chooses, on any processor
    rewrite_state(path.parent, json.dumps(state).encode())
    assert run_ranks(1, _kernels_after_resuming, tuple(overrides)) == [(_kernels(1), state["cpu_kernels"])]
