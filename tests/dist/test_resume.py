"""An interrupted and resumed run equals the uninterrupted run bit by bit."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist.whole_runs import (
    Outcome,
    assert_same_tensors,
    build_run,
    fit,
    recorded_warnings,
    resume,
    saving,
)
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin

TOTAL = 14
#: Rows of an epoch of the small data set; a step takes 4.
ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of 24 rows of 32 tokens: 6 steps an epoch."""
    return _rows(tmp_path_factory, ROWS)


@pytest.fixture(scope="module")
def little_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of 12 rows: 3 steps an epoch."""
    return _rows(tmp_path_factory, ROWS // 2)


def _rows(factory: pytest.TempPathFactory, count: int) -> str:
    folder = factory.mktemp("data")
    samples = [[(i * 7 + j * j) % 64 for j in range(8)] for i in range(count * 4)]
    write_bin(folder / "en" / "a.bin", samples)
    return str(folder)


@dataclass(frozen=True)
class Run:
    """Kind of run: its ranks and overrides, and its last stop and its steps with little data."""

    ranks: int
    overrides: tuple[str, ...] = ()
    stop: int = 3
    total: int = 5


FLOAT16 = "in float16"
STAGES = ("parallel.pipeline.size=2", "model.num_layers=4")
RUNS: dict[str, Run] = {
    "one process": Run(1),
    "data": Run(2, total=TOTAL),
    "saved in the background": Run(2, ("ckpt.async_upload=True",)),
    # So that it overflows and grows again.
    FLOAT16: Run(2, ("model.dtype=torch.float16", "grad_scaler.fp16.growth_interval=1"), stop=6, total=12),
    "fully sharded": Run(2, ("parallel.zero1.fsdp=True", "model.dtype=torch.bfloat16", "ckpt.async_upload=True")),
    "msp": Run(4, ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "model.vocab_size=67")),
    "isp": Run(4, ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=4")),
    "interleaved": Run(2, (*STAGES, "model.num_chunks=2")),
    "ZB-V": Run(2, (*STAGES, "parallel.pipeline.mode=ZBV", "ckpt.async_upload=True")),
}


def _overrides(data: str, folder: Path, kind: str, every: int, total: int = TOTAL) -> list[str]:
    schedules = ["lr_scheduler.warmup_ratio=0.5", "adam.adam_beta2_c=0.8"]
    more = [f"data.train_folder={data}", "model.dtype=torch.float32", "model.drop_rate=0.1", *schedules]
    return saving(folder, *more, *RUNS[kind].overrides, every=every, total=total)


@functools.cache
def _straight(kind: str, data: str, folder: Path, total: int = TOTAL) -> Outcome:
    return fit(RUNS[kind].ranks, _overrides(data, folder / f"straight {kind} {total}", kind, total, total))


#: Steps at which a run is broken off.
STOPS = {
    "at step 1": [1],
    "mid-epoch": [3],
    "at an epoch's edge": [6],
    "at the second edge": [12],
    "three times in one epoch": [7, 9, 10],
}


def _assert_straight(parts: Sequence[Outcome], straight: Outcome) -> None:
    """Assert that a run that was broken off and resumed equals the straight one, on each rank."""
    for rank, whole in enumerate(straight.ranks):
        # As text: the gradient norm of a skipped step is no number.
        assert [repr(entry) for part in parts for entry in part.ranks[rank].log] == list(map(repr, whole.log))
        last = parts[-1].ranks[rank]
        assert (last.state, last.optimizer, last.steps) == (whole.state, whole.optimizer, whole.steps)
        assert last.position == whole.position
        assert_same_tensors(last.streams, whole.streams)
    assert_same_tensors(parts[-1].tensors, straight.tensors)


def _sweep() -> Iterator[object]:
    """Yield kind of run and stops: all stops of the main kind; wide, those of every kind."""
    for kind in RUNS:
        for when in STOPS:
            yield pytest.param(kind, when, marks=[] if kind == "data" else [pytest.mark.wide])


@pytest.mark.parametrize(("kind", "when"), list(_sweep()))
def test_resumed_is_straight(kind: str, when: str, data: str, tmp_path: Path) -> None:
    straight = _straight(kind, data, Path(data).parent)
    ranks = RUNS[kind].ranks
    parts = [fit(ranks, _overrides(data, tmp_path, kind, every=stop), stop) for stop in (*STOPS[when], TOTAL)]
    _assert_straight(parts, straight)
    assert straight.state["step"] == TOTAL


@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind not in ("one process", "data")])
def test_any_kind_of_run_resumes_after_its_first_step_and_after_an_epoch(
    kind: str, little_data: str, tmp_path: Path
) -> None:
    run = RUNS[kind]
    straight = _straight(kind, little_data, Path(little_data).parent, run.total)
    stops = (1, run.stop, run.total)
    _assert_straight(
        [fit(run.ranks, _overrides(little_data, tmp_path, kind, stop, run.total), stop) for stop in stops], straight
    )


def test_the_loss_scale_of_the_run_in_float16_changes(little_data: str) -> None:
    """Before and after each stop, up and down; otherwise its resumes would show nothing."""
    run = RUNS[FLOAT16]
    straight = _straight(FLOAT16, little_data, Path(little_data).parent, run.total)
    skipped = [entry[0] for entry in straight.log if not math.isfinite(entry[2])]
    assert len(skipped) == straight.state["inf_nan_skip_batches"]
    assert {step < run.stop for step in skipped} == {True, False}


# -- snapshots


def _flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "rank-00001.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_the_newest_snapshot_that_verifies_is_resumed(data: str, tmp_path: Path) -> None:
    """Two folders hold snapshots in turns; the one that was resumed is not the next to be replaced."""
    root, straight = tmp_path / "ckpts", _straight("data", data, Path(data).parent)
    keys = [*_overrides(data, tmp_path, "data", every=4), "ckpt.oss_snapshot_freq=1"]
    begun = fit(2, keys, 7)
    assert sorted(path.name for path in root.glob("s*-*")) == ["snapshot-0", "snapshot-1", "step-4"]
    assert resume(2, keys).message == f"resumed from {root}/snapshot-1 at step 7"
    _flip_a_bit(root / "snapshot-1")
    assert resume(2, keys).message == f"resumed from {root}/snapshot-0 at step 6 (snapshot-1 did not verify)"
    before = (root / "snapshot-0" / "manifest.json").read_bytes()
    repeated = fit(2, keys, 7)
    assert (root / "snapshot-0" / "manifest.json").read_bytes() == before
    assert repeated.log == begun.log[6:]
    _assert_straight([begun, fit(2, [*keys, "ckpt.async_upload=True"])], straight)
    # Steps 12 and 14 are checkpoints.
    (root / "step-14").rename(root / "another")
    assert resume(2, keys).message == f"resumed from {root}/snapshot-1 at step 13"
    for name in ("snapshot-0", "snapshot-1"):
        _flip_a_bit(root / name)
    assert resume(2, keys).message == f"resumed from {root}/step-12 at step 12 (snapshot-1 did not verify)"


def _resume_after_restarts_of_rank_0(rank: int, world_size: int, overrides: list[str]) -> tuple[str, list[str]]:
    """Return the message and the warnings of resuming, where the launcher of rank 1 has counted no restart."""
    os.environ.update(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT=str(1 - rank))
    builder = build_run(world_size, tuple(overrides), [])
    with recorded_warnings() as warnings, builder.checkpoints:
        return builder.checkpoints.try_resume_training(builder.trainer.state), warnings


def test_a_job_that_is_restarted_goes_on_although_it_resumes_no_earlier_run(tmp_path: Path) -> None:
    """It resumes what ranks of its launcher have saved; the newest checkpoint is that of an earlier run."""
    fit(1, saving(tmp_path, every=5), 5)
    overrides, launched = saving(tmp_path, "ckpt.auto_resume=False", every=2), {"TORCHELASTIC_RUN_ID": "none"}
    fit(1, overrides, 4, environment=launched)
    restarted = run_ranks(2, _resume_after_restarts_of_rank_0, overrides)
    assert restarted == [(f"resumed from {tmp_path}/ckpts/step-4 at step 4", [])] * 2
    assert resume(1, overrides, launched).message == "nothing to resume; starting from step 0"
