"""``internlm data replay``: losses and gradient norms of a step are those of the run, in other layouts too."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from internlm.cli import training
from internlm.cli.main import get_parser
from internlm.cli.replay import replay
from internlm.cli.replay_rank import replay_rank
from internlm.utils.errors import UserError
from tests.dist.tiny import TINY
from tests.dist.whole_runs import fit, saving
from tests.harness.pool import run_ranks

LAYOUTS = [(2, ("data.global_batch=2",)), (2, ("parallel.pipeline.size=2", "data.micro_num=2"))]
MORE_LAYOUTS = [
    (1, ("data.global_batch=2",)),
    (4, ("parallel.zero1.size=4", "parallel.zero1.fsdp=True", "data.global_batch=2")),
    (4, ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2", "data.global_batch=2")),
    (2, ("parallel.tensor.size=2", "parallel.tensor.mode=mtp", "data.global_batch=2")),
]


def _command(rank: int, world_size: int, words: list[str]) -> tuple[str, str]:
    """Run a rank of the command; return its output and its error."""
    arguments = get_parser().parse_args(["data", "replay", "config.py", *words])
    arguments.config = TINY
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            replay_rank(arguments)
        except UserError as error:
            return output.getvalue(), str(error)
    return output.getvalue(), ""


def _replay(ranks: int, step: int, overrides: list[str], *words: str) -> list[tuple[str, str]]:
    sets = [word for key in overrides for word in ("--set", key)]
    return run_ranks(ranks, _command, [f"--step={step}", *words, *sets])


def _log(folder: Path) -> list[dict[str, Any]]:
    (file,) = (folder / "logs").rglob("metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps have one row."""
    folder = tmp_path_factory.mktemp("one_row")
    fit(1, saving(folder, "data.global_batch=2", total=4))
    return folder


@pytest.fixture(scope="module")
def four_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks whose steps have four rows."""
    folder = tmp_path_factory.mktemp("four_rows")
    fit(2, saving(folder, total=4))
    return folder


@pytest.mark.parametrize(
    ("ranks", "layout"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.wide) for row in MORE_LAYOUTS)]
)
def test_loss_and_norm_are_those_of_the_run(ranks: int, layout: tuple[str, ...], one_row: Path) -> None:
    (output, error), *others = _replay(ranks, 2, [*saving(one_row), *layout], "--json")
    assert not error
    assert others == [("", "")] * (ranks - 1)
    found, logged = json.loads(output), _log(one_row)[2]
    (micro_batch,) = found["micro_batches"]
    assert (found["first_row"], found["rows"], found["saved_at"], micro_batch["row"]) == (2, 1, 2, 2)
    assert micro_batch["loss"] == pytest.approx(logged["loss"], rel=1e-12)
    assert micro_batch["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-12)


def test_each_micro_batch_is_run_with_the_same_parameters(four_rows: Path) -> None:
    """Then the mean of their losses is the loss of the step; and nothing is saved."""
    before = {path: path.read_bytes() for path in (four_rows / "ckpts").rglob("*") if path.is_file()}
    outcomes = _replay(2, 2, [*saving(four_rows), "data.micro_num=2"], "--json")
    found = json.loads(outcomes[0][0])
    logged = _log(four_rows)[2]
    assert [entry["row"] for entry in found["micro_batches"]] == [8, 9, 10, 11]
    assert [(entry["data_rank"], entry["micro_batch"]) for entry in found["micro_batches"]] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-12)
    assert {path: path.read_bytes() for path in (four_rows / "ckpts").rglob("*") if path.is_file()} == before


def test_a_step_between_checkpoints_is_run_with_the_parameters_before_it(four_rows: Path) -> None:
    ((output, _),) = _replay(1, 3, [*saving(four_rows), "data.micro_num=4"])
    title, parameters, head, *rows, last = output.splitlines()
    assert title == "step 3: batch 3, rows 12 to 15"
    assert parameters == f"parameters: {four_rows}/ckpts/step-2"
    assert head.split("  ")[-1] == "gradient norm"
    assert [row.split()[2] for row in rows] == ["12", "13", "14", "15"]
    assert last.startswith("loss of the step: ")


def test_a_step_before_the_first_checkpoint_is_run_with_the_initial_values(four_rows: Path) -> None:
    ((output, _),) = _replay(1, 0, [*saving(four_rows), "data.micro_num=4"], "--json")
    found = json.loads(output)
    assert (found["checkpoint"], found["saved_at"]) == (None, 0)
    assert found["loss"] == pytest.approx(_log(four_rows)[0]["loss"], rel=1e-12)


def test_other_data_and_missing_checkpoints_are_refused_on_all_ranks(four_rows: Path) -> None:
    outcomes = _replay(2, 2, [*saving(four_rows), "data.micro_num=2", "data.seq_len=32"])
    assert len({*outcomes}) == 1
    assert outcomes[0][1].startswith("data.seq_len: 32, but ")
    outcomes = _replay(2, 2, [*saving(four_rows), "data.micro_num=2"], f"--ckpt={four_rows / 'none'}")
    assert len({*outcomes}) == 1
    assert "no such checkpoint" in outcomes[0][1]


def test_ranks_get_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["data", "replay", "c.py", "--step=7", "--ckpt=a b", "--json", "--set=a=1", "--nproc-per-node=2"]
    launched: list[Any] = []
    monkeypatch.setattr(training, "launch", lambda *given: launched.append(given) or 0)
    arguments = get_parser().parse_args(words)
    assert replay(arguments) == 0
    ((options, script),) = launched
    assert (options, script[:2]) == (["--nproc-per-node=2"], ["-m", "internlm"])
    expected = argparse.Namespace(**{**vars(arguments), "launcher_words": []})
    assert vars(get_parser().parse_args(script[2:])) == vars(expected)
