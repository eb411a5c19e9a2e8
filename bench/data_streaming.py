"""Race loaders of streamed texts: ``python -m bench.data_streaming [--rounds 5] [--workers 1] [--format parquet]``.

The texts are the sources of Python's standard library and their docstrings (``tools/demo_corpus.py``), the tokenizer is
a byte-level BPE that is trained on them. Each side makes the same number of tokens per turn, as batches of tensors. The
sides take turns in one process, so that drifts of the machine hit all of them alike:

- ``ours``: the training loader with ``data.type = "streaming"``.
- ``datasets``: the `datasets` library, shuffled with a buffer of equal size, the tokenizer called for each
  document, and a plain loop that joins documents and cuts rows. Left out if the library is not installed.
- ``plain``: the same loop over the texts that pyarrow or the json module reads, without shuffling.
- ``tokenizer``: the tokenizer alone, in batches, on texts in memory: the limit of every loader.

Tokenizers use one thread for each call, so that with one worker all sides use one core.
"""

from __future__ import annotations

import argparse
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the package is imported

import importlib.util
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch

from internlm.accelerator.processor import processor_name
from internlm.config.schema import DataConfig
from internlm.core.parallel.sharding import ALONE
from internlm.data.build import build_train_loader
from internlm.data.tokenizer import load_tokenizer
from tools.demo_corpus import read_sources

VOCABULARY = 8192
SEQ_LEN, ROWS = 2048, 4
ROW_GROUP = 1000


def write_corpus(folder: Path, file_format: str) -> tuple[list[str], Path]:
    """Write the texts below ``folder``, train a tokenizer, and return both."""
    splits = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    texts = [text for split in splits.values() for texts in split for text in texts if text.strip()]
    data = folder / "data"
    data.mkdir()
    if file_format == "parquet":
        pq.write_table(pa.table({"text": texts}), data / "1.parquet", row_group_size=ROW_GROUP)
    else:
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (data / "1.jsonl").write_text("".join(lines))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::5], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return texts, folder


def ours(data: Path, tokenizer: Path, workers: int, buffer: int) -> Iterator[torch.Tensor]:
    """Batches of the training loader."""
    config = DataConfig(
        type="streaming",
        train_folder=str(data),
        tokenizer_path=str(tokenizer),
        seq_len=SEQ_LEN,
        micro_bsz=1,
        micro_num=ROWS,
        total_steps=10**9,
        num_worker=workers,
        shuffle_buffer=buffer,
    )
    loader, _ = build_train_loader(config, VOCABULARY, seed=1, replica=ALONE)
    for batch, _ in loader:
        yield batch["input_ids"]


def joined(texts: Iterator[str], tokenizer: Any) -> Iterator[torch.Tensor]:
    """Batches of a plain loop: encode each document, join all, cut rows, stack them."""
    eos = tokenizer.token_to_id("</s>")
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
        while len(tokens) > ROWS * SEQ_LEN:
            rows = torch.tensor(tokens[: ROWS * SEQ_LEN + 1])
            yield torch.stack([rows[:-1].view(ROWS, SEQ_LEN), rows[1:].view(ROWS, SEQ_LEN)])[0]
            del tokens[: ROWS * SEQ_LEN]


def plain_texts(data: Path) -> Iterator[str]:
    """Texts of the one file, for ever."""
    while True:
        for file in data.iterdir():
            if file.suffix == ".parquet":
                for batch in pq.ParquetFile(file).iter_batches(1000):
                    yield from batch.column(0).to_pylist()
            else:
                with file.open() as lines:
                    yield from (json.loads(line)["text"] for line in lines)


def datasets_texts(data: Path, buffer: int) -> Iterator[str]:
    """Texts by the `datasets` library, for ever."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = importlib.import_module("datasets")
    (file,) = data.iterdir()
    kind = "parquet" if file.suffix == ".parquet" else "json"
    stream = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
    epoch = 0
    while True:
        shuffled = stream.shuffle(seed=epoch, buffer_size=buffer)
        yield from (record["text"] for record in shuffled)
        epoch += 1


def tokens_of_turn(batches: Iterator[torch.Tensor], count: int) -> tuple[int, float]:
    """Read batches of at least ``count`` tokens; return their number and the seconds."""
    start, read = time.perf_counter(), 0
    while read < count:
        read += next(batches).numel()
    return read, time.perf_counter() - start


def tokenizer_turns(texts: list[str], path: Path, chunk: int = 64) -> Iterator[torch.Tensor]:
    """Encode texts in memory, in batches; yield a tensor of as many tokens, which is not filled."""
    tokenizer = load_tokenizer(str(path))
    while True:
        remaining = iter(texts)
        while some := list(islice(remaining, chunk)):
            yield torch.empty(sum(map(len, tokenizer.encode_batch(some))))


def main() -> None:
    """Run the race and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of a turn (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="threads of our loader (default: %(default)s)")
    parser.add_argument("--buffer", type=int, default=4096, help="documents shuffled together (default: %(default)s)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="format of the texts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts, path = write_corpus(Path(folder), args.format)
        fast = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        data = path / "data"
        sides: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "ours": lambda: ours(data, path, args.workers, args.buffer),
            "datasets": lambda: joined(datasets_texts(data, args.buffer), fast),
            "plain": lambda: joined(plain_texts(data), fast),
            "tokenizer": lambda: tokenizer_turns(texts, path),
        }
        if importlib.util.find_spec("datasets") is None:
            del sides["datasets"]
            print("the package 'datasets' is not installed; its side is left out", file=sys.stderr)
        speeds = race({name: open_side() for name, open_side in sides.items()}, args.rounds, args.tokens)
    medians = {name: round(median(of_side)) for name, of_side in speeds.items()}
    over = {
        name: round(median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)), 2)
        for name in speeds
        if name != "ours"
    }
    settings = {"format": args.format, "workers": args.workers, "documents": len(texts)}
    result = {"processor": processor_name(), **settings, "tokens_per_second": medians, "ours_over": over}
    print(json.dumps(result, indent=1))


def race(sides: dict[str, Iterator[torch.Tensor]], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Let the sides take turns; return the tokens per second of each turn."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, batches in sides.items():
            read, seconds = tokens_of_turn(batches, tokens)
            if turn:  # the first one opens files and fills buffers
                speeds[name].append(read / seconds)
    return speeds


if __name__ == "__main__":
    main()
