"""Conversion to and from Hugging Face folders beside reading and writing the same bytes.

A round converts a folder to a checkpoint (``from-hf``), or in further rounds this checkpoint to a folder (``to-hf``),
before or after the yardstick, in turns: reading the file in blocks of 4 MiB and writing them, with ``fsync``. What is
read lies in the cache of the system. Before each turn, a file of the same size is written and removed, since a virtual
machine may take seconds to get memory for the cache of what is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from internlm.accelerator import processor
from internlm.checkpoint.hf_export import Export, export
from internlm.checkpoint.hf_folder import CONFIG, ONE_FILE
from internlm.checkpoint.hf_import import import_folder
from internlm.checkpoint.hf_specs import spec_of_config
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.safetensors_files import header_of, write_tensors
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.config.families import FAMILIES
from internlm.config.schema import ModelConfig
from internlm.model.families import spec_of
from internlm.model.hf_config import to_hf_config
from internlm.model.hf_tensors import hf_tensors, tensor_shapes

BLOCK = 4 << 20
SIZES = dict(hidden_size=2048, num_attention_heads=16, num_kv_attention_heads=4, vocab_size=32000, mlp_ratio=2.6875)


def make_folder(folder: Path, family: str, layers: int, dtype: torch.dtype) -> int:
    """Write a Hugging Face folder with random weights, and return the bytes of its tensors."""
    folder.mkdir()
    spec = spec_of(FAMILIES[family], ModelConfig(**SIZES, num_layers=layers))
    shapes = tensor_shapes(spec)
    rows = {row.name: (dtype, row.shape(shapes[row.ours])) for row in hf_tensors(spec)}
    (folder / CONFIG).write_text(json.dumps(to_hf_config(family, spec)))
    with LocalStorage(folder).create(ONE_FILE) as sink:
        write_tensors(sink, header_of(rows), (torch.randn(shape, dtype=dtype) for _, shape in rows.values()))
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape in rows.values())


def copy(source: Path, target: Path) -> None:
    """Read and write a file as the yardstick does."""
    block = memoryview(bytearray(BLOCK))
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while count := reading.readinto(block):
            writing.write(block[:count])
        os.fsync(writing.fileno())


def to_hf(checkpoint: Path, target: Path) -> None:
    """Convert a checkpoint as ``internlm convert to-hf`` does."""
    opened = open_checkpoint(LocalStorage(checkpoint.parent), checkpoint.name)
    export(opened, spec_of_config(opened.state.config, str(checkpoint)), target, Export())


def seconds(run: Callable[[Path], object], source: Path, target: Path) -> float:
    """Return the time that a conversion of ``source`` takes; what it writes is removed."""
    copy(source, target)
    target.unlink()
    start = time.perf_counter()
    run(target)
    taken = time.perf_counter() - start
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return taken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.models convert``."""
    parser.add_argument("--family", default="LLAMA2", choices=FAMILIES)
    parser.add_argument("--layers", type=int, default=9, help="layers of 50 million parameters")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each direction")
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: that of the system)")


def run(args: argparse.Namespace) -> None:
    """Print the times of each round, and the ratio of medians for each direction."""
    torch.set_num_threads(1)
    gc.freeze()  # a collection that visits all imported modules takes tenths of a second
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        size = make_folder(root / "hf", args.family, args.layers, getattr(torch, args.dtype))
        import_folder(root / "hf", root / "step-0")
        print(f"{processor.processor_name()}, one thread, {args.family}, {size / 1e9:.2f} GB in {args.dtype}")
        (stored,) = (root / "step-0").glob("*.bin")
        compare("from-hf", partial(import_folder, root / "hf"), root / "hf" / ONE_FILE, args.rounds)
        compare("to-hf", partial(to_hf, root / "step-0"), stored, args.rounds)


def compare(name: str, converts: Callable[[Path], object], source: Path, rounds: int) -> None:
    """Print the times of a conversion, whose input is mainly the file ``source``, and of copying this file."""
    target, copies = source.parent.parent / "out", partial(copy, source)
    times: list[tuple[float, float]] = []
    for index in range(rounds):
        # In both orders, since a disk may be slower after a write.
        turns = (converts, copies) if index % 2 else (copies, converts)
        found = {turn: seconds(turn, source, target) for turn in turns}
        times.append((found[converts], found[copies]))
        print(f"{name:8} {times[-1][0]:.2f} s, copy {times[-1][1]:.2f} s", flush=True)
    mine, raw = (median(side) for side in zip(*times, strict=True))
    print(f"{name}: {mine:.2f} s, copy {raw:.2f} s, ratio of medians {mine / raw:.2f}", flush=True)
