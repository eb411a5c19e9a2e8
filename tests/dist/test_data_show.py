"""``internlm data show``: the tokens that each rank of a run has read, after a resume with another batch size too."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.cli.main import main
from tests.dist.tiny import TINY
from tests.dist.whole_runs import build_run, saving
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin
from tests.unit.data.streams import write_streamed

Part = tuple[str, ...]
#: Two data-parallel ranks, then two that split each row between two ranks, with half of the batch.
FIRST = ("data.micro_num=2",)
SECOND = ("data.micro_num=1", "parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")
#: Shares of the types in a first part, and others in a second.
BLENDED = ("data.micro_num=2", "data.weights={'cn': 3, 'en': 1}")
REBLENDED = ("data.micro_num=2", "data.weights={'en': 3, 'cn': 1}", "ckpt.allow_data_changes=True")


@dataclass(frozen=True)
class Runs:
    """A run of two parts, with the input ids that each rank read in each step."""

    config: Path
    keys: list[str]
    parts: tuple[Part, Part]
    batches: dict[int, list[Tensor]]

    @property
    def folder(self) -> Path:
        return self.config.parent


def _train(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[int, Tensor]:
    """Train, and return the input ids of the batches that were read."""
    builder = build_run(world_size, overrides, [])
    loader, read, batches = builder.train_dl, builder.train_dl.read, {}

    def reading(step: int) -> Any:
        batch = read(step)
        batches[step] = batch[0]["input_ids"].clone()
        return batch

    loader.read = reading  # type: ignore[method-assign]
    builder.fit()
    return batches


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("shown")
    _write_tokens(folder / "data")
    return _run(folder, [f"data.train_folder={folder / 'data'}"], (FIRST, SECOND), (2, 4))


def _write_tokens(folder: Path) -> None:
    for name in ("cn", "en"):
        write_bin(folder / name / "a.bin", [[(i * 5 + j) % 63 for j in range(i % 40)] for i in range(90)])


def _run(folder: Path, keys: list[str], parts: tuple[Part, Part], ranks: tuple[int, int]) -> Runs:
    """Train two parts of a run, of four steps each."""
    config = folder / "config.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in TINY.items()))
    batches: dict[int, list[Tensor]] = {}
    for count, part, total in zip(ranks, parts, (4, 8), strict=True):
        read = run_ranks(count, _train, tuple(saving(folder, *keys, *part, total=total)))
        batches |= {step: [of_rank[step] for of_rank in read] for step in read[0]}
    return Runs(config, [*saving(folder, *keys)], parts, batches)


def _show(runs: Runs, capsys: pytest.CaptureFixture[str], step: int, *words: str) -> dict[str, Any]:
    """Return the output of the command."""
    capsys.readouterr()
    overrides = [word for key in (*runs.keys, *runs.parts[step // 4]) for word in ("--set", key)]
    assert not main(["data", "show", str(runs.config), "--step", str(step), "--json", *overrides, *words])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _ids(entry: dict[str, Any], length: int) -> Tensor:
    """Return the input ids of the micro-batches of a rank."""
    ids = torch.zeros(len(entry["micro_batches"]), length, dtype=torch.int64)
    for row, micro_batch in zip(ids, entry["micro_batches"], strict=True):
        for span in micro_batch["spans"]:
            row[span["at"] : span["at"] + len(span["input_ids"])] = torch.tensor(span["input_ids"])
    return ids


@pytest.mark.parametrize("source", ["log", "checkpoints", "checkpoint"])
def test_every_rank_has_read_what_is_shown(
    source: str, runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if source != "log":
        monkeypatch.setattr("internlm.checkpoint.data_position._record_of", lambda checkpoint, step: None)
    assert sorted(runs.batches) == [*range(8)]
    for step in (0, 3, 4, 7):
        of_ranks = runs.batches[step]
        chosen = ["--ckpt", str(runs.folder / "ckpts" / "step-4")] if source == "checkpoint" and step >= 4 else []
        for rank, expected in enumerate(of_ranks):
            shown = _show(runs, capsys, step, "--rank", str(rank), "--text", "--world", str(len(of_ranks)), *chosen)
            assert shown["contradiction"] is None
            (entry,) = shown["readers"]
            assert entry["ranks"] == [rank]
            assert _ids(entry, expected.shape[1]).equal(expected), (step, rank)
            after = None if chosen else str(runs.folder / "ckpts" / f"step-{step // 2 * 2 + 2}")
            assert shown["confirmed_by"] == ("the log of the run" if source == "log" else after)


@pytest.mark.parametrize("kind", ["blended", "streamed"])
def test_a_run_of_another_kind_has_read_what_is_shown(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights change with the second part, and no sample is read twice."""
    if kind == "blended":
        _write_tokens(tmp_path / "data")
        runs = _run(tmp_path, [f"data.train_folder={tmp_path / 'data'}"], (BLENDED, REBLENDED), (2, 2))
    else:
        keys = write_streamed(tmp_path)
        runs = _run(tmp_path, keys, ((), ()), (2, 1))
    read: list[tuple[str, int, int]] = []
    tokens: list[Counter[str]] = [Counter(), Counter()]
    for step, of_ranks in runs.batches.items():
        shown = _show(runs, capsys, step, "--text", "--world", str(len(of_ranks)))
        assert shown["confirmed_by"] == "the log of the run"
        assert [entry["ranks"] for entry in shown["readers"]] == [[rank] for rank in range(len(of_ranks))]
        for entry, expected in zip(shown["readers"], of_ranks, strict=True):
            assert _ids(entry, expected.shape[1]).equal(expected), step
            for span in (span for micro_batch in entry["micro_batches"] for span in micro_batch["spans"]):
                read += [(span["file"], span["row"], token) for token in range(span["begin"], span["stop"])]
                tokens[step // 4][span["type_name"]] += span["stop"] - span["begin"]
    assert len(read) > 900
    if kind == "blended":
        assert len(read) == len({*read})
        assert [part["cn"] / part.total() for part in tokens] == pytest.approx([3 / 4, 1 / 4], abs=40 / 512)


def test_the_number_of_processes_and_the_rows_are_those_of_the_run(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _show(runs, capsys, 2)
    assert (shown["world"], [entry["ranks"] for entry in shown["readers"]]) == (2, [[0], [1]])
    shown = _show(runs, capsys, 5, "--micro-batch", "0")
    assert (shown["world"], [entry["ranks"] for entry in shown["readers"]]) == (4, [[0, 1], [2, 3]])
    assert [shown[key] for key in ("first_row", "rows", "batch")] == [18, 2, 5]
    assert shown["readers"][0]["micro_batches"][0]["row"] == 18


def test_rows_of_another_batch_size_are_not_passed_off_as_those_of_the_step(
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    assert _show(runs, capsys, 5, "--set", "data.micro_num=3")["rows"] == 2  # as the log says
    assert not caplog.messages
    monkeypatch.setattr("internlm.checkpoint.data_position._record_of", lambda checkpoint, step: None)
    shown = _show(runs, capsys, 5, "--set", "data.micro_num=3")
    expected = "step-6 would have been saved at row 28, but it was saved at row 20"
    assert shown["confirmed_by"] is None
    assert expected in shown["contradiction"]
    (warning,) = caplog.messages
    assert expected in warning
    assert warning.endswith("Pass the config and --world of the run that read step 5")


def test_the_log_has_the_rows_of_each_step(runs: Runs) -> None:
    (file,) = (runs.folder / "logs").rglob("metrics.jsonl")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [[entry[f"data_{key}"] for key in ("batch", "first_row", "rows")] for entry in entries]
    assert rows == [[step, 4 * step, 4] for step in range(4)] + [[4 + i, 16 + 2 * i, 2] for i in range(4)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "data.seq_len=32"], "data.seq_len: 32, but "),
        (["--rank", "4"], "--rank: 4 is not a rank of the run. Pass a rank below --world, 4"),
        (["--micro-batch", "1"], "--micro-batch: 1 is no micro-batch of step 5. Pass a number below 1"),
        (["--ckpt", "FOLDER/ckpts/step-6"], "step-6: was saved at step 6, after step 5 was read. Pass an earlier"),
        (["--ckpt", "FOLDER/none"], "none: no such checkpoint"),
        (["--set", "ckpt.save_ckpt_folder=FOLDER/empty"], "--world: is unknown: there is no checkpoint that has"),
        (["--text", "--tokenizer", "FOLDER/none"], "none: no such file or folder"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _show(runs, capsys, 5, *(word.replace("FOLDER", str(runs.folder)) for word in words))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_texts_are_printed_without_control_characters(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forging:
        def decode(self, ids: list[int]) -> str:
            return "\x1b[31mred\nrank 0"

    monkeypatch.setattr("internlm.cli.data_show.load_tokenizer", lambda path: Forging())
    overrides = [word for key in (*runs.keys, *SECOND) for word in ("--set", key)]
    assert not main(["data", "show", str(runs.config), "--step=5", "--text", "--tokenizer=t", *overrides])
    output = capsys.readouterr().out
    assert "'\\x1b[31mred\\nrank 0'" in output
    assert "\x1b" not in output
