"""``internlm generate``, and the way from a checkpoint to text in Python."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from internlm.cli import training
from internlm.cli.generate_rank import GrowingText, generate_rank
from internlm.cli.generation import generate as command
from internlm.cli.main import get_parser
from internlm.core.parallel import initialization
from internlm.data.tokenizer import load_tokenizer
from internlm.eval import generate, load_model
from internlm.utils.errors import UserError
from tests.dist.test_doc_blocks import ROOT, blocks
from tests.dist.tiny import TINY
from tests.dist.whole_runs import fit, saving
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.hf_samples import converted, same_bits, tensors_of, weights_of
from tests.unit.data.files import write_bin

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "über naïve café"] * 4
MODEL = ("model_type=GEMMA3", "model.num_layers=4", "model.sliding_window=4", "model.vocab_size=320")
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of the checkpoints of a run on two ranks, and its tokenizer."""
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
    write_bin(folder / "data" / "en" / "a.bin", [model.encode(text) for text in TEXT])
    fit(2, saving(folder, *MODEL, f"data.train_folder={folder / 'data'}", "parallel.pipeline.size=2", total=2))
    return folder / "ckpts", tokenizer


@pytest.fixture(scope="module")
def hugging_face(saved: tuple[Path, Path]) -> Path:
    """The same model and tokenizer as a folder of Hugging Face, in several files."""
    return converted(saved[0] / "step-2", saved[0].parent / "hf", tokenizer=saved[1], shard_bytes=50000)


def _command(rank: int, world_size: int, words: list[str]) -> tuple[str, str]:
    """Run a rank of the command; return its output and its error."""
    arguments = get_parser().parse_args(["generate", "config.py", *words])
    arguments.config = TINY
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            generate_rank(arguments)
        except UserError as error:
            return output.getvalue(), str(error)
    return output.getvalue(), ""


def _generated(ranks: int, checkpoint: Path, *words: str, keys: tuple[str, ...] = MODEL) -> list[tuple[str, str]]:
    overrides = (word for key in (*keys, f"data.micro_num={ranks}") for word in ("--set", key))
    return run_ranks(ranks, _command, [f"--ckpt={checkpoint}", *words, *overrides])


def test_texts_are_those_of_a_script_in_any_layout(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = saved
    tokenizer, model = load_tokenizer(str(path)), load_model(folder)
    prompts = [PROMPT, "über naïve"]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    ids = generate(model, encoded, 8, temperature=0.7, top_k=50, seed=[7, 8])
    texts = [tokenizer.decode(start + new) for start, new in zip(encoded, ids, strict=True)]
    (tmp_path / "prompts.txt").write_text(f"\n{prompts[1]}\r\n", encoding="utf-8-sig")
    words = [f"--tokenizer={path}", f"--prompt={PROMPT}", "--max-new-tokens=8", "--temperature=0.7", "--top-k=50"]
    words += ["--seed=7", "--stop=319"]
    both = [*words, f"--prompt-file={tmp_path / 'prompts.txt'}"]
    (one,) = _generated(1, folder, *words)
    assert one == (f"{texts[0]}\n", "")
    first, second = _generated(2, folder / "step-2", *both, keys=(*MODEL, "parallel.pipeline.size=2"))
    # Control characters could control a terminal.
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in texts[1])
    assert first == (f"--- prompt 1\n{texts[0]}\n--- prompt 2\n{shown}\n", "")
    assert second == ("", "")


def test_a_folder_of_hugging_face_is_continued_by_its_own_tokenizer(
    saved: tuple[Path, Path], hugging_face: Path
) -> None:
    options = [f"--prompt={PROMPT}", "--max-new-tokens=12", "--temperature=0", "--stop=319"]
    (expected,) = _generated(1, saved[0], f"--tokenizer={saved[1]}", *options)
    layout = (*MODEL, "parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=2")
    assert _generated(2, hugging_face, *options, keys=layout)[0] == expected
    ((output, error),) = _generated(1, hugging_face, *options, keys=(*MODEL, "model.rope_base=7.0"))
    assert not output
    assert error.startswith("model.rope_base, rope_scaling or their neighbours: ")


def test_all_of_a_model_is_loaded_and_nothing_is_drawn(
    saved: tuple[Path, Path], hugging_face: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "draw", lambda *_: pytest.fail("values were drawn"))
    monkeypatch.setattr(torch, "empty_like", lambda x, **keywords: torch.full_like(x, torch.nan, **keywords))
    expected = tensors_of(saved[0] / "step-2")
    for model in (load_model(saved[0]), load_model(hugging_face), load_model(f"local:{hugging_face}/")):
        assert same_bits(weights_of(model), expected)
    narrow = load_model(hugging_face, ["model.dtype=torch.float32"])
    assert same_bits(weights_of(narrow), {name: x.float() for name, x in expected.items()})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight: expected shape \[400, 32\], got \[320, 32\]\. "):
        load_model(hugging_face, ["model.vocab_size=400"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a", "--tokenizer="], r"^--tokenizer: is not given\. Pass it, or set data\.tokenizer_path"),
        (["--prompt=a", "--tokenizer=/none.model"], r"^/none\.model: no such file or folder\. Pass a sentencepiece"),
        ([], r'^--prompt: is not given\. Pass --prompt "TEXT", or'),
        (["--prompt=a\udcff"], r"^--prompt: 'a\\udcff' is not UTF-8\. Convert it to UTF-8$"),
        (["--prompt=a", "--seed=18446744073709551616"], r"^generate\(seed=…\): must be less than 2\*\*64"),
        (["--prompt="], r"^--prompt: '' has no tokens\. Pass a text, or --bos"),
        (["--prompt-file=/none.txt"], r"^--prompt-file: /none\.txt cannot be read \(No such file or directory\)\. "),
        (["--prompt=a", "--stop=x y"], r"^--stop: expected the text of one token, got 'x y' of \d+ tokens\. "),
        (["--prompt=a", "--stop=320"], r"^--stop: expected an id from 0 to 319, got 320\. "),
        (["--prompt=a", "--ckpt=/none/step-1"], r"^/none/step-1: no such checkpoint"),
        (
            ["--prompt=a", "--set", "model.vocab_size=64"],
            r"has ids up to 319, but model\.vocab_size is 64\. Use",
        ),
        (["--prompt=a", "--set", "model.hidden_size=64"], r"model\.hidden_size"),
    ],
    ids=str,
)
def test_mistakes_are_named(words: list[str], message: str, saved: tuple[Path, Path]) -> None:
    folder, path = saved
    overrides = [word for key in MODEL for word in ("--set", key)]
    ((output, error),) = run_ranks(1, _command, [f"--ckpt={folder}", f"--tokenizer={path}", *overrides, *words])
    assert not output
    assert re.search(message, error)


def test_a_model_needs_a_checkpoint_that_is_one(saved: tuple[Path, Path]) -> None:
    folder, _ = saved
    with pytest.raises(UserError, match=r"/none/step-1: no such checkpoint"):
        load_model("/none/step-1")
    with pytest.raises(UserError, match=r"model\.hidden_size|expected"):
        load_model(folder, ["model.hidden_size=64"])
    assert next(load_model(str(folder), ["model.dtype=torch.float32"]).parameters()).element_size() == 4


def test_the_page_goes_from_a_folder_to_text(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_ckpts").mkdir()
    (tmp_path / "llm_ckpts" / "first").symlink_to(saved[0])
    (tmp_path / "tokenizer.model").symlink_to(saved[1])
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    (text,) = blocks("python", ROOT / "doc" / "generation.md")
    exec(text, {"print": printed.append})
    assert len(text.strip().splitlines()) <= 10
    assert [line.startswith(start) for line, start in zip(printed, ("Once upon", "The answer"), strict=True)] == [
        True
    ] * 2


def test_a_growing_text_is_the_text_of_all_tokens(saved: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(str(saved[1]))
    prompt, ids = tokenizer.encode(PROMPT), tokenizer.encode(" fox über 雪 \n the end of it all" * 12)
    text = GrowingText(tokenizer, prompt)
    pieces = [text.add(token) for token in ids]
    assert len(ids) > 200  # several windows
    assert "".join(pieces) + text.rest() == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    assert sum(map(bool, pieces)) > len(ids) / 2
    assert text.add(tokenizer.vocab_size) == text.rest() == ""  # a padded vocabulary has ids without a token


def test_ranks_get_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "c.py", "--ckpt=a b", "--prompt=- x", "--prompt=y", "--stop=</s>", "--bos", "--top-k=5"]
    words += ["--prompt-file=p.txt", "--set", "data.micro_num=1", "--seed=3", "--nproc-per-node=2"]
    launched: list[Any] = []
    monkeypatch.setattr(training, "launch", lambda *given: launched.append(given) or 0)
    arguments = get_parser().parse_args(words)
    assert command(arguments) == 0
    ((options, script),) = launched
    assert (options, script[:2]) == (["--nproc-per-node=2"], ["-m", "internlm"])
    assert vars(get_parser().parse_args(script[2:])) == vars(
        argparse.Namespace(**{**vars(arguments), "launcher_words": []})
    )
