"""Reading of token files, without a model: order of samples, rows by format, long documents, and the index.

``python -m bench.data [order] [rows] [long] [index] [--rounds 9] [--folder DIR]`` prints a table for each part. The
sides of a comparison take turns in one run; figures are medians over the rounds. The data are made first, below
``--folder``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from internlm.accelerator import processor
from internlm.config.schema import DataConfig
from internlm.core.parallel.sharding import ALONE
from internlm.data.best_fit import pack
from internlm.data.binary_tokens import HEADER, write_tokens
from internlm.data.blend import Blend, Dataset, Mark, Phase
from internlm.data.build import build_train_loader
from internlm.data.index import CACHE_NAME
from internlm.data.order import shuffled
from internlm.data.tokenized_source import TokenizedSource

VOCAB = 32_000
SEQ_LEN, MICRO_NUM = 4096, 8
#: Tokens that a side reads in a turn.
TOKENS_OF_A_TURN = 4_000_000
SHORT, LONG = 1000, 2_000_000  # mean tokens of a short document, tokens of a long one


# -- data -------------------------------------------------------------------------------------------------------------
def make_documents(count: int, mean: int, seed: int) -> list[np.ndarray]:
    """Documents of random ids; their lengths are distributed exponentially, as those of web pages roughly are."""
    rng = np.random.default_rng(seed)
    lengths = 32 + rng.exponential(mean - 32, count).astype(np.int64)
    return [rng.integers(0, VOCAB, length) for length in lengths]


def write_json(path: Path, documents: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = []
    with path.open("wb") as stream:
        for tokens in documents:
            sizes.append(stream.write(json.dumps({"tokens": tokens.tolist()}).encode() + b"\n"))
    with path.with_name(path.name + ".meta").open("wb") as stream:
        np.save(stream, np.stack([np.cumsum(sizes) - sizes, list(map(len, documents))], axis=1))


def write_binary(path: Path, documents: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tokens(path, documents, VOCAB - 1)


# -- measurement ------------------------------------------------------------------------------------------------------
def take_turns(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Call each side once per round; return the median of what a second yields, of tokens or of calls."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            amount = side()
            found[name].append(amount / (time.perf_counter() - start))
    return {name: median(rates) for name, rates in found.items()}


def loader_of(folder: Path, micro_bsz: int = 1) -> Callable[[], int]:
    """Side that reads batches with one worker."""
    steps = TOKENS_OF_A_TURN // (SEQ_LEN * micro_bsz * MICRO_NUM)
    sizes = dict(seq_len=SEQ_LEN, micro_bsz=micro_bsz, micro_num=MICRO_NUM, total_steps=10**6, num_worker=1)
    loader, _ = build_train_loader(DataConfig(**sizes, train_folder=str(folder)), VOCAB, 1, ALONE)
    batches = iter(loader)

    def side() -> int:
        return sum(labels.numel() for _, labels in islice(batches, steps))

    return side


def slices_of(path: Path, micro_bsz: int = 1) -> Callable[[], int]:
    """Side that copies rows from a memory map as ids and as labels: as little as a loader can do."""
    length = SEQ_LEN * micro_bsz
    tokens = np.memmap(path, np.uint16, "r", HEADER.size, ids_in(path))
    rows = iter(np.random.default_rng(2).integers(0, len(tokens) // length - 1, 10**6).tolist())

    def side() -> int:
        count = 0
        for row in islice(rows, TOKENS_OF_A_TURN // length):
            piece = tokens[row * length : (row + 1) * length + 1]
            ids, labels = piece[:-1].astype(np.int64), piece[1:].astype(np.int64)
            count += min(len(ids), len(labels))
        return count

    return side


def ids_in(path: Path) -> int:
    """Number of ids in a binary token file without a mask."""
    return int.from_bytes(path.read_bytes()[24:32], "little")


def plain_loop(path: Path) -> Callable[[], int]:
    """Side that does the same with ``torch.utils.data`` and one worker: parse a line, concatenate, make tensors."""
    lines = path.read_bytes().splitlines()

    class Documents(torch.utils.data.Dataset[list[int]]):
        def __len__(self) -> int:
            return len(lines)

        def __getitem__(self, index: int) -> list[int]:
            return json.loads(lines[index])["tokens"]

    def collate(documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor([token for document in documents for token in document])
        rows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
        return rows, rows.roll(-1, 1)

    batch = SEQ_LEN * MICRO_NUM // SHORT
    loader = torch.utils.data.DataLoader(Documents(), batch, shuffle=True, num_workers=1, collate_fn=collate)

    def endless() -> Iterator[int]:
        while True:
            yield from (labels.numel() for _, labels in loader)

    counts = endless()
    next(counts)  # starts the worker

    def side() -> int:
        return sum(islice(counts, TOKENS_OF_A_TURN // (SEQ_LEN * MICRO_NUM)))

    return side


# -- parts ------------------------------------------------------------------------------------------------------------
def rows(folder: Path, rounds: int) -> None:
    """Loader alone, one worker, against a memory map and against a plain loop; tokens per second."""
    documents = make_documents(30_000, SHORT, seed=1)
    write_json(folder / "json/x.bin", documents)
    write_binary(folder / "binary/x.tokens", documents)
    for micro_bsz in (1, 8):
        sides = {
            "memory map, slices and int64 copies": slices_of(folder / "binary/x.tokens", micro_bsz),
            "binary": loader_of(folder / "binary", micro_bsz),
            "JSON lines": loader_of(folder / "json", micro_bsz),
        }
        if micro_bsz == 1:
            sides["torch.utils.data, JSON lines"] = plain_loop(folder / "json/x.bin")
        rates = take_turns(sides, rounds)
        limit = rates["memory map, slices and int64 copies"]
        print(f"rows of {SEQ_LEN * micro_bsz} tokens, {MICRO_NUM} a batch, documents of {SHORT} tokens:")
        for name, rate in rates.items():
            print(f"  {name:40} {rate / 1e6:8.1f} M tokens/s {rate / limit:7.2f}")


def long(folder: Path, rounds: int) -> None:
    """Rows of 4096 tokens from short documents and from documents of two million tokens; milliseconds."""
    rng = np.random.default_rng(3)
    write_json(folder / "short/x.bin", make_documents(5_000, SHORT, seed=3))
    write_json(folder / "long/x.bin", [rng.integers(0, VOCAB, LONG) for _ in range(3)])
    sides: dict[str, Callable[[], int]] = {}
    for name in ("short", "long"):
        data = DataConfig(seq_len=SEQ_LEN, micro_bsz=1, total_steps=1, train_folder=str(folder / name))
        packed = build_train_loader(data, VOCAB, 1, ALONE)[0].rows
        numbers = iter(range(10**9))
        sides[name] = lambda packed=packed, numbers=numbers: len([packed[row] for row in islice(numbers, 100)])
    times = {name: 1e3 / rate for name, rate in take_turns(sides, rounds).items()}
    print(f"a row of {SEQ_LEN} tokens from JSON lines, documents of {SHORT} and of {LONG} tokens:")
    print(f"  short {times['short']:.2f} ms, long {times['long']:.2f} ms, ratio {times['long'] / times['short']:.2f}")


def index(folder: Path, rounds: int) -> None:
    """Opening of 10^7 samples in 10 files, and of 100,000 samples in 20,000 files; seconds."""
    line = b'{"tokens": [1, 2, 3]}\n'
    for name, files, samples in (("10^7 samples in 10 files", 10, 10**6), ("20,000 files of 5 samples", 20_000, 5)):
        root = folder / name.replace(" ", "-")
        offsets = np.arange(samples) * len(line)
        for number in range(files):
            path = root / f"type-{number % 10}/{number}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(line * samples)
            np.save(path.with_name(path.name + ".meta").open("wb"), np.stack([offsets, np.full(samples, 3)], axis=1))
        times: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(max(1, rounds // 3)):
            (root / CACHE_NAME).unlink(missing_ok=True)
            for state in times:
                start = time.perf_counter()
                source = TokenizedSource(str(root), 0, VOCAB)
                assert len(source.lengths) == files * samples
                source.fingerprint()
                times[state].append(time.perf_counter() - start)
        print(f"index of {name}: " + ", ".join(f"{state} {median(some):.2f} s" for state, some in times.items()))


def order(folder: Path, rounds: int) -> None:
    """Beginning of an epoch of 10^7 samples, best-fit packing and blending; seconds and microseconds per sample."""
    rng = np.random.default_rng(4)
    lengths = 1 + rng.exponential(SHORT - 1, 10**7).astype(np.int64)
    some, number = lengths[: 10**6], 2 * 10**5
    datasets = [Dataset(str(part), np.arange(part, len(some), 5)) for part in range(5)]

    def blend() -> int:
        made = Blend(datasets, some, None, 1, by_items=True)
        made.start(Mark(0, 0, 0, 0, (0,) * 5, (0,) * 5), [Phase(0, (0.4, 0.3, 0.1, 0.1, 0.1))])
        return len(made.samples(number - 1, number)) * number

    sides: dict[str, Callable[[], int]] = {
        "beginning of an epoch": lambda: len(shuffled(lengths, None, 1, 0).prepare()),
        "best-fit packing": lambda: len(some) if len(pack(some, SEQ_LEN, SEQ_LEN, 1)) else 0,
        "blend of five datasets": blend,
    }
    for name, rate in take_turns(sides, rounds).items():
        print(f"{name:40} {1e6 / rate:8.3f} microseconds per sample")


PARTS = {"order": order, "rows": rows, "long": long, "index": index}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor.processor_name()}, median of {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.parts or PARTS:
            PARTS[name](Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
