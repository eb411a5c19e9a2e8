"""Data for fine-tuning: only answers are trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from internlm.cli.main import main
from internlm.data.packing import IGNORED, PackingLayout, RowShape
from internlm.data.rows import ValidRows
from internlm.data.tokenized_source import TokenizedSource
from internlm.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
RECORDS = [
    {"instruction": "pack! {prompt}", "input": "", "output": "my box!"},
    {"instruction": "jump", "input": "the fox!", "output": "over!!"},
    {"instruction": "über", "output": "naïve"},
    {"instruction": "no answer", "input": None, "output": ""},
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer whose token 0 is the exclamation mark, as in many published ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(str(folder)).encode("!") == [0]
    return folder


def tokenize(tmp_path: Path, tokenizer: Path, *more: str, records: list[dict[str, str]] | None = None) -> int:
    """Run ``internlm tokenize --format alpaca``; return the exit code."""
    (tmp_path / "data.json").write_text(json.dumps(RECORDS if records is None else records))
    paths = ["--text_input_path", str(tmp_path / "data.json"), "--bin_output_path", str(tmp_path / "out/x.bin")]
    try:
        command = ["tokenize", *paths, "--tokenizer_path", str(tokenizer), "--format", "alpaca", "--overwrite", *more]
        return main(command) or 0
    except SystemExit as error:
        return int(error.code or 0)


def test_loss_is_taken_on_answers_only(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(tmp_path, tokenizer_folder, "--prompt-template", r"User: {prompt}\nBot: ") == 0
    prompts = ["User: pack! {prompt}\nBot: ", "User: jump\nthe fox!\nBot: ", "User: über\nBot: "]
    answers = ["my box!", "over!!", "naïve"]
    tokenizer = load_tokenizer(str(tokenizer_folder))
    prompt_ids, answer_ids = tokenizer.encode_batch(prompts), tokenizer.encode_batch(answers)
    source = TokenizedSource(str(tmp_path / "out"), 0, tokenizer.vocab_size)
    row = ValidRows(source, RowShape(256, 1, PackingLayout.PACKED))[0]
    # Every token of an answer is a label, and so is its eos token; no token of a prompt is.
    expected = [[*answer, tokenizer.eos_id] for answer in answer_ids]
    assert row.labels[row.labels != IGNORED].tolist() == [token for answer in expected for token in answer]
    whole = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, expected, strict=True)]
    inputs = [token for sample in whole for token in sample]
    assert row.input_ids[: len(inputs)].tolist() == inputs
    (trained,) = np.nonzero(row.labels != IGNORED)
    assert (row.labels[trained] == row.input_ids[trained + 1]).all()
    printed = capsys.readouterr().out
    assert f"3 samples, {len(inputs)} tokens, of which {sum(map(len, prompt_ids))} of prompts" in printed
    assert "blank text, left out: 1" in printed


def test_the_split(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"instruction": "?", "output": str(i)} for i in range(25)]
    assert tokenize(tmp_path, tokenizer_folder, "--split-ratio", "0.2", records=records) == 0
    tokenizer = load_tokenizer(str(tokenizer_folder))

    def answers(folder: str) -> list[int]:
        source = TokenizedSource(str(tmp_path / "out" / folder), 0, tokenizer.vocab_size)
        samples = [source.read(sample) for sample in range(len(source.lengths))]
        return [int(tokenizer.decode(sample[sample >= 0][:-1].tolist())) for sample in samples]

    assert answers("valid") == [4, 9, 14, 19, 24]
    assert answers("train") == [i for i in range(25) if i % 5 != 4]
    data = f"train_folder='{tmp_path}/out/train', valid_folder='{tmp_path}/out/valid', tokenizer_path="
    assert data in capsys.readouterr().out

    assert tokenize(tmp_path, tokenizer_folder, "--split-ratio", "0.01", records=records) == 2
    message = f"--split-ratio: 0.01 of 25 samples leaves {tmp_path}/out/valid/x.bin without any. Pass more samples"
    assert capsys.readouterr().err.startswith(message)
    assert len(answers("train")) == 20  # as before: neither file is replaced


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompt-template", "x"), "--prompt-template: expected {prompt} once, got it 0 times in 'x'"),
        (("--format", "text", "--prompt-template", "{prompt}"), "--prompt-template: is for --format alpaca only"),
        (("--split-ratio", "1"), "expected a number from 0 to below 1, got '1'"),
        (("--split-ratio", "nan"), "expected a number from 0 to below 1, got 'nan'"),
        (("--on-error", "ignore"), "'ignore' is unknown. Pass one of fail, skip"),
    ],
)
def test_bad_arguments(
    more: tuple[str, ...], message: str, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(tmp_path, tokenizer_folder, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "x"}, "record 0: has no key 'output', only 'instruction'. Give each record an instruction"),
        ({"text": "x"}, "record 0: has no key 'instruction', only 'text'. Give each record an instruction"),
        ({"instruction": "x", "output": "y", "input": 3}, "record 0: expected a string at key 'input', got int"),
    ],
)
def test_bad_records(
    record: dict[str, str], message: str, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(tmp_path, tokenizer_folder, records=[record]) == 2
    assert message in capsys.readouterr().err
    skip = ("--on-error", "skip")
    assert tokenize(tmp_path, tokenizer_folder, *skip, records=[record, *RECORDS]) == 0
    assert "3 samples" in (printed := capsys.readouterr().out)
    assert ", skipped: 1 (" in printed


def test_the_script(tmp_path: Path, sentencepiece_model: Path) -> None:
    records = [{"instruction": "pack", "input": "", "output": str(i)} for i in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    script, environment = str(ROOT / "tools/alpaca_tokenizer.py"), {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, str(tmp_path / "data.json"), str(tmp_path / "out"), str(sentencepiece_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(str(sentencepiece_model))
    prompt = [-token for token in tokenizer.encode("<|User|>:pack\n<|Bot|>:")]
    for folder, numbers in (("train", [i for i in range(20) if i % 10 != 9]), ("valid", [9, 19])):
        source = TokenizedSource(str(tmp_path / "out" / folder), 0, tokenizer.vocab_size)
        assert source.types == ["en"]
        samples = [source.read(sample).tolist() for sample in range(len(source.lengths))]
        assert samples == [[1, *prompt, *tokenizer.encode(str(number)), 2] for number in numbers]
