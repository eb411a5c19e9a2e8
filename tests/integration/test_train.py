"""``train.py`` under torchrun, under Slurm and on the pool: a table of runs, and what each must leave behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.harness.ports import free_port
from tests.integration.jobs import ROOT, debug_losses, lines, metrics, records, train, train_on_pool
from tests.unit.data.files import write_bin

#: What a step logs, in this order; ``{type}`` stands for each type of data.
KEYS = """
    tflops, step, loss, real_tgs, tgs (tokens/gpu/second), tgs/last_tgs_1, tgs/tgs_all, tgs/tgs_avg, tgs/tgs_SMA,
    tgs/last_tgs_10, tgs/last_tgs_50, lr, loss_scale, grad_norm, micro_num, num_consumed_tokens, inf_nan_skip_batches,
    num_samples_in_batch, largest_length, largest_batch, smallest_batch, adam_beta2, fwd_bwd_time, acc, perplexity,
    acc/{type}, tokens/{type}, loss_from_metric, loss/{type}
"""


def _keys(types: Sequence[str]) -> list[str]:
    names = [name.strip() for name in KEYS.split(",")]
    return [key for name in names for key in ([name.format(type=t) for t in types] if "{type}" in name else [name])]


# -- the debug configs


@pytest.mark.parametrize("name", ["internlm", "internlm2", "llama2"])
def test_debug_configs(name: str) -> None:
    """They learn, and two ranks learn the same as one."""
    one, two = debug_losses(name, 1), debug_losses(name, 2)
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)
    assert sum(one[-5:]) < sum(one[:5]) - 0.05


# -- a table of runs


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run of a debug config of 4 steps, and files that it must write."""

    config: str
    ranks: int
    overrides: Sequence[str] = ()
    options: Sequence[str] = ()
    types: Sequence[str] = ("random",)
    files: Sequence[str] = ()
    valid: dict[int, Sequence[str]] = field(default_factory=dict)
    """Steps after which it validates, and on which types."""
    launched: bool = False
    """Whether it is started by torchrun, and not on the pool."""


ROWS = {
    "packed, tokenized, validation": Row(
        config="internlm2",
        ranks=2,
        overrides=(
            "data.train_folder={data}", "data.valid_folder={data}", "data.valid_every=3", "parallel.zero1.size=1",
        ),
        types=("cn", "en"),
        valid={2: ("cn", "en"), 3: ("cn", "en")},
    ),
    "unpacked, everything recorded": Row(
        config="internlm",
        ranks=2,
        overrides=(
            "data.use_packed_dataset=False", "enable_tb=True", "model.checkpoint=0.5", "data.valid_every=4",
            "data.valid_max_batches=2",
        ),
        options=("--profiling", "--seed", "7"),
        files=(
            "train.log", "trace-rank0.json", "trace-rank1.json", "memory-rank0.txt", "memory-rank1.txt",
            "tensorboards/events.out.tfevents.*",
        ),
        valid={3: ("val",)},
    ),
    "windows, ramp-up, bf16": Row(
        config="llama2",
        ranks=1,
        overrides=(
            "data.train_folder=local:{data}", "data.pack_sample_into_one=True", "data.num_worker=2", "data.micro_bsz=1",
            "data.rampup_batch_size=1 1 2", "data.skip_batches='1-1'", "model.dtype=torch.bfloat16",
            "model.num_layers=1",
        ),
        types=("cn", "en"),
        launched=True,
    ),
    "a pipeline, drawn": Row(
        config="llama2",
        ranks=2,
        overrides=(
            "data.train_folder={data}", "data.valid_folder={data}", "data.valid_every=1", "data.valid_micro_num=1",
            "parallel.pipeline.size=2", "parallel.pipeline.mode=zbv", "model.num_layers=4",
            "model.tie_word_embeddings=True", "hybrid_zero_optimizer.overlap_sync_grad=True",
        ),
        options=("--pipeline-trace", "--ledger"),
        types=("cn", "en"),
        files=("pipeline.html", "pipeline-trace.json"),
        valid=dict.fromkeys(range(4), ("cn", "en")),  # of which nothing is drawn
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("cn", "en")):
        samples = [[(i * j + number) % 250 for j in range(5 + i % 60)] for i in range(40)]
        write_bin(folder / name / "a.bin", samples)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, data: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    overrides = [override.format(data=data) for override in row.overrides]
    job = (train if row.launched else train_on_pool)(
        row.ranks, f"configs/debug/{row.config}.py", tmp_path, "data.total_steps=4", *overrides, options=row.options
    )
    assert (job.returncode, job.left_behind) == (0, 0), job.stderr
    (record,) = records(tmp_path)
    assert record.parent.name == f"debug_{row.config}"
    _check_metrics(record, row)
    for pattern in row.files:
        assert all(path.stat().st_size for path in record.glob(pattern)), pattern
        assert list(record.glob(pattern)), pattern
    assert job.stderr.count("Memory plan") == 1
    if "memory-rank0.txt" in row.files:
        _check_memory((record / "memory-rank0.txt").read_text())
    if "pipeline.html" in row.files:
        _check_drawing(record, job.stderr)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
    assert written == {"RUN"}


def _check_metrics(record: Path, row: Row) -> None:
    steps = metrics(record)
    expected = _keys(row.types)
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    for line in steps:
        assert list(line)[: len(expected)] == expected
        assert all(math.isfinite(value) for value in line.values())
        assert line["tokens/" + row.types[0]] >= 0
        assert line["loss"] == pytest.approx(line["loss_from_metric"], rel=1e-6)
    valid = {line["step"]: line for line in lines(record) if "loss" not in line}
    assert valid.keys() == row.valid.keys()
    for step, types in row.valid.items():
        figures = [f"valid/{figure}" for figure in ("loss", "acc", "perplexity")]
        assert list(valid[step]) == ["step", *figures, *(f"{figure}/{t}" for t in types for figure in figures)]
    if list(record.glob("tensorboards/*")):
        board = EventAccumulator(str(record / "tensorboards")).Reload()
        assert set(board.Tags()["scalars"]) == {key for line in lines(record) for key in line}
        assert [event.step for event in board.Scalars("loss")] == [0, 1, 2, 3]
        assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in steps])


def _check_memory(report: str) -> None:
    """Bytes held between steps are those of the plan."""
    size = r"([\d.]+(?: [MG]iB)?)"
    rows = re.findall(rf"^ *{size} +{size}  (?!total$)(.*)$", report, re.MULTILINE)
    assert {name for _, _, name in rows} >= {"parameters", "gradients", "optimizer: exp_avg"}
    assert all(held == planned for held, planned, _ in rows)


def _check_drawing(record: Path, log: str) -> None:
    """Of a V on two stages, two micro-batches: F, B and W of two chunks each, simulated and measured."""
    assert re.search(r"pipeline of step 3 in \S+: simulated [\d.]+ ms, [\d.]+% idle, measured [\d.]+ ms", log)
    events = json.loads((record / "pipeline-trace.json").read_text())["traceEvents"]
    actions = Counter((event["pid"], event["tid"]) for event in events if event["ph"] == "X")
    assert actions == dict.fromkeys(itertools.product((0, 1), (0, 1)), 12)
    for timeline in (0, 1):
        end = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == timeline)
        assert 0 < end < 60e6


# -- Slurm


def test_slurm(tmp_path: Path) -> None:
    """Two processes that srun would have started train as torchrun's do."""
    port = free_port()
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs/debug/internlm2.py")]
    command += ["--port", str(port), "--set", "data.micro_num=1"]
    common = {
        "SLURM_NPROCS": "2", "SLURM_JOB_NODELIST": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "INTERNLM_DEVICE": "cpu",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(2):
            environment = {**os.environ, **common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    (record,) = records(tmp_path)
    assert [line["loss"] for line in metrics(record)] == debug_losses("internlm2", 2)
