"""The data of the demo, built from a small tree of sources."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from internlm.data.tokenized_source import TokenizedSource
from internlm.data.tokenizer import load_tokenizer
from tools import demo_corpus

ROOT = Path(__file__).parents[3]
VOCAB = 400
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def source_of(i: int) -> str:
    word, other = WORDS[i % 10], WORDS[i * 7 % 10]
    return (
        f'"""Module number {i} of the tree, which is all about {word} and {other}."""\n\n\n'
        f'def {word}(x):\n    """Short."""\n    return x\t# tab\n\n\n'
        f'class {other.title()}:\n    """Something that keeps {word} and {other} apart, {i} times."""\n'
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty good files, and some to be left out."""
    root = tmp_path_factory.mktemp("tree")
    files = {f"m{i:02}.py": source_of(i) for i in range(60)}
    files |= {"test/t.py": "left = 'out'", "bad.py": "def (:", "a.txt": "left out", "_sysconfigdata_x.py": "left = 1"}
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def corpus(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "demo"
    demo_corpus.build(tree, out, VOCAB)
    return out


def texts(corpus: Path, split: str, name: str) -> list[str]:
    source = TokenizedSource(str(corpus / split / name), 0, VOCAB)
    tokenizer = load_tokenizer(str(corpus / "tokenizer.model"))
    tokens = [source.read(sample).tolist() for sample in range(len(source.lengths))]
    assert all(ids[-1] == tokenizer.eos_id for ids in tokens)
    return [tokenizer.decode(ids[:-1]) for ids in tokens]


def test_files_are_split_with_their_docstrings_and_kept_exactly(corpus: Path) -> None:
    held_out = [i for i in range(60) if demo_corpus.is_held_out(f"m{i:02}.py")]
    rest = [i for i in range(60) if i not in held_out]
    assert 1 <= len(held_out) <= 10
    for split, numbers in (("train", rest), ("valid", held_out)):
        assert texts(corpus, split, "code") == [source_of(i) for i in numbers]
        docstrings = texts(corpus, split, "en")
        assert len(docstrings) == 2 * len(numbers)
        assert docstrings[0] == source_of(numbers[0]).splitlines()[0].strip('"')


def test_stats(corpus: Path) -> None:
    stats = json.loads((corpus / "stats.json").read_text())
    assert stats["train"]["code"]["samples"] + stats["valid"]["code"]["samples"] == 60
    for split in ("train", "valid"):
        source = TokenizedSource(str(corpus / split), 0, VOCAB)
        assert sum(part["tokens"] for part in stats[split].values()) == source.lengths.sum()
        assert stats[split]["en"]["bytes"] == (corpus / split / "en/stdlib.bin").stat().st_size
    *by_type, total = (stats["unigram_entropy"][name] for name in ("code", "en", "total"))
    assert min(by_type) < total < max(by_type) < math.log(VOCAB)


def test_unigram_entropy() -> None:
    entropy = demo_corpus.unigram_entropy(Counter({0: 1, 1: 1}), Counter({0: 5, 2: 7}), vocab_size=4)
    assert entropy == pytest.approx(-(math.log(6 / 16) + math.log(1 / 16)) / 2)


def test_the_same_sources_give_the_same_data(corpus: Path, tree: Path, tmp_path: Path) -> None:
    script = [sys.executable, "tools/demo_corpus.py"]
    arguments = ["--out", str(tmp_path), "--source", str(tree), "--vocab_size", str(VOCAB)]
    environment = {**os.environ, "PYTHONPATH": ".", "PYTHONHASHSEED": "1"}
    subprocess.run(script + arguments, cwd=ROOT, env=environment, check=True, capture_output=True)
    made = [path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file() and path.name != ".internlm_index"]
    assert len(made) == 10
    for name in made:
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_what_is_complete_is_left_alone(corpus: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "read_sources", None)  # fails where it is made again
        stats = demo_corpus.build(tree, corpus, VOCAB)
    assert stats == json.loads((corpus / "stats.json").read_text())


def test_what_is_incomplete_is_made_again(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "make_stats", None)  # as if it had been interrupted there
        with pytest.raises(TypeError):
            demo_corpus.build(tree, tmp_path, VOCAB)
    assert not (tmp_path / "stats.json").exists()
    demo_corpus.build(tree, tmp_path, VOCAB)
    assert (tmp_path / "stats.json").exists()
