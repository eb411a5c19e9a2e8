"""Make data for a first run from the sources of Python's standard library, which every machine has.

Two dataset types: ``code`` (.py files, one sample each) and ``en`` (their docstrings, one sample each). One file in
twenty is held out for validation, with its docstrings. A tokenizer is trained on the others. The same version of Python
gives the same data.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import platform
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from internlm.data.text_encoder import Recipe, make_recipe
from internlm.data.tokenized_source import TokenizedSource
from internlm.data.tokenized_writer import Summary, tokenize_samples
from internlm.utils.errors import exit_on_user_error

VERSION = 1
#: Folders of tests, tables and installed packages, whose content differs from machine to machine.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}
HELD_OUT_PERCENT = 5
SHORTEST_DOCSTRING = 40  # characters
TOKENIZER_SAMPLE = 3_000_000  # characters
SPLITS, TYPES = ("train", "valid"), ("code", "en")


class Texts(NamedTuple):
    """Samples of one split, by type."""

    code: list[str]
    en: list[str]


def read_sources(root: Path) -> dict[str, Texts]:
    """Read the samples of both splits, in the order of the file names."""
    splits = {split: Texts([], []) for split in SPLITS}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if LEFT_OUT.intersection(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            docstrings = list(find_docstrings(text))
        except (UnicodeDecodeError, SyntaxError):
            continue  # the library contains files that are invalid on purpose, for its tests
        split = splits["valid" if is_held_out(name) else "train"]
        split.code.append(text)
        split.en.extend(docstrings)
    return splits


def is_held_out(name: str) -> bool:
    """Return whether a file is held out for validation, by a hash of its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % 100 < HELD_OUT_PERCENT


def find_docstrings(text: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, without very short ones."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= SHORTEST_DOCSTRING:
                yield docstring


def train_tokenizer(texts: Texts, vocab_size: int, file: Path) -> None:
    """Train a lossless sentencepiece BPE tokenizer on an even sample of the lines."""
    import sentencepiece  # here, because a second run does not train

    lines = [line for text in (*texts.code, *texts.en) for line in text.splitlines(keepends=False) if line]
    stride = 1 + sum(map(len, lines)) // TOKENIZER_SAMPLE
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[::stride]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9999,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\t"],
        num_threads=2,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


def count_tokens(folder: Path, vocab_size: int) -> dict[str, Counter[int]]:
    """Count the occurrences of each token, by type."""
    source = TokenizedSource(str(folder), 0, vocab_size)
    counts: dict[str, Counter[int]] = {name: Counter() for name in source.types}
    for sample, type_id in enumerate(source.type_ids):
        counts[source.types[type_id]].update(source.read(sample).tolist())
    return counts


def unigram_entropy(valid: Counter[int], train: Counter[int], vocab_size: int) -> float:
    """Compute the cross entropy of ``valid`` under the frequencies of ``train``, in nats per token.

    One is added to each count (Laplace smoothing), so that a token that ``train`` lacks has a finite loss.
    """
    total = math.log(train.total() + vocab_size)
    return sum(count * (total - math.log(train[token] + 1)) for token, count in valid.items()) / valid.total()


def make_stats(out: Path, written: dict[str, dict[str, Summary]], vocab_size: int) -> dict[str, object]:
    """Return the sizes of all files, and the validation loss of a model that knows only token frequencies."""
    train, valid = (count_tokens(out / split, vocab_size) for split in SPLITS)
    frequencies = sum(train.values(), Counter())
    entropy = {name: unigram_entropy(valid[name], frequencies, vocab_size) for name in TYPES}
    entropy["total"] = unigram_entropy(sum(valid.values(), Counter()), frequencies, vocab_size)
    return {
        **{
            split: {
                name: {
                    "samples": summary.samples,
                    "tokens": summary.tokens,
                    "bytes": (out / split / name / "stdlib.bin").stat().st_size,
                }
                for name, summary in types.items()
            }
            for split, types in written.items()
        },
        "unigram_entropy": entropy,
    }


def build(root: Path, out: Path, vocab_size: int) -> dict[str, object]:
    """Make everything, or nothing if it is up to date.

    ``stats.json`` is written last, so its presence means that all other files are complete.
    """
    marker = out / "stats.json"
    made_by = {"version": VERSION, "python": platform.python_version(), "source": root.name, "vocab_size": vocab_size}
    if marker.is_file() and (stats := json.loads(marker.read_text()))["made_by"] == made_by:
        return stats
    marker.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    splits = read_sources(root)
    train_tokenizer(splits["train"], vocab_size, out / "tokenizer.model")
    recipe: Recipe = make_recipe(str(out / "tokenizer.model"))

    def tokenize(split: str, name: str) -> Summary:
        samples = [("", text) for text in getattr(splits[split], name)]
        (summary,) = tokenize_samples(samples, [out / split / name / "stdlib.bin"], recipe, workers=1)
        return summary

    written = {split: {name: tokenize(split, name) for name in TYPES} for split in splits}
    stats = {"made_by": made_by, **make_stats(out, written, vocab_size)}
    partial = marker.with_suffix(".partial")
    partial.write_text(json.dumps(stats, indent=2) + "\n")
    partial.replace(marker)
    return stats


@exit_on_user_error
def main() -> None:
    """Make the data and print its sizes."""
    parser = argparse.ArgumentParser(description="Make data for a first run from the sources of Python's library.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to write (default: data/demo)")
    library = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--source", type=Path, default=library, help="folder of .py files (default: the library)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens of the tokenizer (default: 4096)")
    args = parser.parse_args()
    start = time.perf_counter()
    stats = build(args.source, args.out, args.vocab_size)
    print(json.dumps(stats, indent=2))
    print(f"{args.out} is ready ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
