"""``internlm eval``: the figures of the run that saved, in other layouts, without an optimizer."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from internlm.cli import training
from internlm.cli.eval_rank import evaluate_rank
from internlm.cli.evaluation import evaluate
from internlm.cli.main import get_parser
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.errors import UserError
from tests.dist.tiny import TINY
from tests.dist.whole_runs import fit, saving
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.hf_samples import converted
from tests.unit.data.files import write_bin

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "über naïve café"] * 4
LAYOUTS = [(1, ()), (2, ("parallel.pipeline.size=2", "data.micro_num=2"))]
MORE_LAYOUTS = [
    (4, ("parallel.zero1.size=4", "parallel.zero1.fsdp=True")),
    (4, ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")),
    (4, ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "parallel.pipeline.size=2", "data.micro_num=2")),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run on two ranks with a validation after its last step, and the overrides of its model and data."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = folder / "tokenizer.model"
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(tokenizer.with_suffix("")),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    model = SentencePieceProcessor(model_file=str(tokenizer))
    for name in ("cn", "en"):
        samples = [model.encode(f"{name} {text} {index}") for index, text in enumerate(TEXT)]
        write_bin(folder / "data" / name / "a.bin", samples)
    keys = [f"data.{name}_folder={folder / 'data'}" for name in ("train", "valid")]
    keys += [f"data.tokenizer_path={tokenizer}", "data.valid_every=2", "model.vocab_size=320"]
    fit(2, saving(folder, *keys, total=2))
    return folder, keys


def _command(rank: int, world_size: int, words: list[str]) -> tuple[str, str]:
    """Run a rank of the command; return its output and its error."""
    arguments = get_parser().parse_args(["eval", "config.py", *words])
    arguments.config = TINY
    output, no_optimizer = io.StringIO(), patch.object(HybridZeroOptimizer, "__init__", side_effect=AssertionError)
    with contextlib.redirect_stdout(output), no_optimizer:
        try:
            evaluate_rank(arguments)
        except UserError as error:
            return output.getvalue(), str(error)
    return output.getvalue(), ""


def _evaluated(ranks: int, checkpoint: Path, overrides: list[str], *words: str) -> list[tuple[str, str]]:
    return run_ranks(
        ranks, _command, [f"--ckpt={checkpoint}", *words, *(word for key in overrides for word in ("--set", key))]
    )


def _metrics(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "logs").rglob("metrics.jsonl")
    return [line for line in map(json.loads, file.read_text().splitlines()) if "valid/loss" in line][-1]


@pytest.mark.parametrize(
    ("ranks", "layout"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.wide) for row in MORE_LAYOUTS)]
)
def test_the_figures_are_those_of_the_run(ranks: int, layout: tuple[str, ...], saved: tuple[Path, list[str]]) -> None:
    folder, keys = saved
    (output, error), *others = _evaluated(ranks, folder / "ckpts", [*keys, *layout], "--json")
    assert not error
    assert others == [("", "")] * (ranks - 1)
    found, expected = json.loads(output), _metrics(folder)
    assert (found["checkpoint"], found["step"]) == (str(folder / "ckpts" / "step-2"), 2)
    assert [entry["type"] for entry in found["types"]] == ["cn", "en"]
    for entry in (*found["types"], found["total"]):
        suffix = "" if entry["type"] == "total" else f"/{entry['type']}"
        for key, name in (("loss", "loss"), ("acc", "accuracy"), ("bits_per_byte", "bits_per_byte")):
            assert entry[name] == pytest.approx(expected[f"valid/{key}{suffix}"], rel=1e-9)
    sums = [sum(entry[key] for entry in found["types"]) for key in ("tokens", "bytes")]
    assert sums == [found["total"][key] for key in ("tokens", "bytes")]


def test_the_table_has_a_line_for_each_type(saved: tuple[Path, list[str]]) -> None:
    folder, keys = saved
    ((output, _),) = _evaluated(1, folder / "ckpts" / "step-2", keys)
    title, head, *rows = output.splitlines()
    assert title == f"{folder}/ckpts/step-2 (step 2)"
    assert head.split("  ")[-1] == "bits per byte"
    assert [row.split()[0] for row in rows] == ["cn", "en", "total"]
    hf = converted(folder / "ckpts" / "step-2", folder / "hf")
    ((of_folder, _),) = _evaluated(1, hf, keys)
    assert of_folder.splitlines() == [str(hf), head, *rows]


def test_a_damaged_checkpoint_is_refused_on_all_ranks(saved: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, keys = saved
    copy = tmp_path / "step-2"
    copy.mkdir()
    for file in (folder / "ckpts" / "step-2").iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".bin":  # every piece has a flipped bit
            content[::64] = bytes(byte ^ 1 for byte in content[::64])
        (copy / file.name).write_bytes(content)
    outcomes = _evaluated(2, copy, keys)
    assert len({*outcomes}) == 1
    assert str(copy) in outcomes[0][1]


def test_another_model_or_no_data_is_refused(saved: tuple[Path, list[str]]) -> None:
    folder, keys = saved
    ((_, error),) = _evaluated(1, folder / "ckpts", [*keys, "model.hidden_size=64"])
    assert "model.hidden_size" in error
    ((_, error),) = _evaluated(1, folder / "ckpts", [*keys, "data.valid_folder=None"])
    assert error == (
        "data.valid_folder: is not set, so there is no data to evaluate on. Pass --set data.valid_folder=FOLDER"
    )
    ((_, error),) = _evaluated(1, folder / "data", keys)
    assert error.startswith(f"{folder / 'data'}: not a checkpoint")


def test_ranks_get_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["eval", "c.py", "--ckpt=a b", "--json", "--set", "data.micro_num=1", "--seed=3", "--nproc-per-node=2"]
    launched: list[Any] = []
    monkeypatch.setattr(training, "launch", lambda *given: launched.append(given) or 0)
    arguments = get_parser().parse_args(words)
    assert evaluate(arguments) == 0
    ((options, script),) = launched
    assert (options, script[:2]) == (["--nproc-per-node=2"], ["-m", "internlm"])
    assert vars(get_parser().parse_args(script[2:])) == vars(
        argparse.Namespace(**{**vars(arguments), "launcher_words": []})
    )
