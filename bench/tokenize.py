"""Tokenizing, beside the tokenizer packages alone on the same texts.

``python -m bench.tokenize [--megabytes 24] [--rounds 3] [--workers 2]`` prints JSON. The texts are sources of Python's
library, and both tokenizers are trained on them. All measurements of a kind take turns in one run; figures are medians
over the rounds, in MB of text per second, and in MB per second of CPU time of all processes together, which other
programs of the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

# Read by the tokenizers package: one thread in each process, as in those of the command.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from internlm.cli.main import main as internlm

VOCAB_SIZE = 16_384
LONGEST_TEXT = 4_000  # characters
KINDS = ("sentencepiece", "hugging_face")


class Seconds(NamedTuple):
    """Time of a run."""

    wall: float
    cpu: float  # of all processes together


def now() -> Seconds:
    """Return the time, and the CPU time of this process and of its children that have ended."""
    times = os.times()
    return Seconds(time.perf_counter(), sum(times[:4]))


def since(start: Seconds) -> Seconds:
    """Return the times since ``start``."""
    return Seconds(*(stop - begin for begin, stop in zip(start, now(), strict=True)))


def read_texts(megabytes: float) -> list[str]:
    """Return parts of the library's modules, again from the first one until there are enough."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts: list[str] = []
    size = 0
    for file in cycle([file for file in files if "site-packages" not in file.parts]):
        content = file.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(content), LONGEST_TEXT):
            texts.append(content[start : start + LONGEST_TEXT])
            size += len(texts[-1].encode())
            if size >= megabytes * 1e6:
                return [text for text in texts if not text.isspace()]
    raise AssertionError("the library has no modules")


def train(kind: str, texts: Sequence[str], folder: Path) -> Path:
    """Train a byte-pair tokenizer, and return its path."""
    if kind == "sentencepiece":
        import sentencepiece

        model = io.BytesIO()
        lines = (line for text in texts for line in text.splitlines() if line)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            normalization_rule_name="identity",
            minloglevel=2,
        )
        path = folder / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return path
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def run_package(kind: str, path: Path, texts: list[str]) -> Seconds:
    """Return the time that the tokenizer package alone takes for texts in memory, with one thread."""
    if kind == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        start = now()
        model.encode(texts, num_threads=1)
    else:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        start = now()
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return since(start)


def run_packages(kind: str, path: Path, texts: list[str], workers: int) -> Seconds:
    """Return the time until ``workers`` processes at once have tokenized a part of the texts each."""
    parts = [(kind, path, texts[worker::workers]) for worker in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        times = pool.starmap(run_package, parts, chunksize=1)
    return Seconds(max(each.wall for each in times), sum(each.cpu for each in times))


def run_command(path: Path, texts: Path, output: Path, workers: int) -> Seconds:
    """Return the time of ``internlm tokenize`` from a file to a file, with the start of its processes."""
    arguments = ["--text_input_path", str(texts), "--tokenizer_path", str(path), "--bin_output_path", str(output)]
    start = now()
    with redirect_stdout(io.StringIO()):
        internlm(["tokenize", "--overwrite", *arguments, "--num_workers", str(workers)])
    return since(start)


def measure(kind: str, texts: list[str], folder: Path, rounds: int, workers: int) -> dict[str, float]:
    """Return the speeds of one kind of tokenizer, and their ratios."""
    path = train(kind, texts[:: max(1, len(texts) // 2000)], folder)
    file, output = folder / "texts.jsonl", folder / "out.bin"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    alone, command = "package", "command"
    package_processes, command_workers = f"package in {workers} processes", f"command with {workers} workers"
    runs: dict[str, Callable[[], Seconds]] = {
        alone: lambda: run_package(kind, path, texts),
        command: lambda: run_command(path, file, output, 1),
        package_processes: lambda: run_packages(kind, path, texts, workers),
        command_workers: lambda: run_command(path, file, output, workers),
    }
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    wall = {name: megabytes / median(each.wall for each in values) for name, values in times.items()}
    cpu = {name: megabytes / median(each.cpu for each in values) for name, values in times.items()}
    figures = {
        **wall,
        f"{command} / {alone}": wall[command] / wall[alone],
        f"{command_workers} / {workers} x {alone}": wall[command_workers] / workers / wall[alone],
        f"{command_workers} / {package_processes}": wall[command_workers] / wall[package_processes],
        **{f"{name}, CPU": speed for name, speed in cpu.items()},
        f"{command} / {alone}, CPU": cpu[command] / cpu[alone],
        f"{command_workers} / {package_processes}, CPU": cpu[command_workers] / cpu[package_processes],
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    """Measure both kinds of tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--megabytes", type=float, default=24, help="size of the texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="tokenizers (default: both)")
    options = parser.parse_args()
    texts = read_texts(options.megabytes)
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            speeds = measure(kind, texts, Path(folder), options.rounds, options.workers)
        print(json.dumps({"tokenizer": kind, **speeds}), flush=True)


if __name__ == "__main__":
    main()
