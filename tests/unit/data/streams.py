"""Folders of texts in all formats, and streams of them."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from internlm.config.schema import DataConfig
from internlm.data.build import row_shape
from internlm.data.build_stream import build_stream_rows
from internlm.data.stream_rows import StreamRows

VOCABULARY = 400


def json_lines(texts: Sequence[Any]) -> bytes:
    return "".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)).encode()


def write_texts(path: Path, texts: Sequence[str | None], block: int = 7) -> Path:
    """Write texts in the format that the suffixes name, in row groups and record batches of ``block`` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=block)
    elif path.suffix == ".arrow":
        opened = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=block)
    else:
        content = json_lines(texts)
        if ".txt" in path.name.lower():
            content = "".join(f"{text}\n" for text in texts).encode()
        elif ".json" in path.suffixes:
            content = json.dumps([{"text": text} for text in texts]).encode()
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": _zstd}.get(path.suffix, bytes)
        path.write_bytes(compress(content))
    return path


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def data_config(folder: Path, tokenizer: Path, **keys: Any) -> DataConfig:
    fixed = dict(type="streaming", train_folder=str(folder), tokenizer_path=str(tokenizer), total_steps=9)
    return DataConfig.model_validate({**fixed, "seq_len": 16, "micro_bsz": 2, "num_worker": 0, **keys})


def open_stream(folder: Path, tokenizer: Path, vocab_size: int = VOCABULARY, **keys: Any) -> StreamRows:
    """The training rows of a folder."""
    data = data_config(folder, tokenizer, **keys)
    return build_stream_rows(data, row_shape(data), seed=3, vocab_size=vocab_size, step_rows=4)


def write_streamed(folder: Path) -> list[str]:
    """Write texts of two types, of which a short run reads several epochs, and a tokenizer; return the overrides."""
    for name in ("en/1.parquet", "en/2.jsonl.gz", "cn/1.txt"):
        write_texts(folder / "data" / name, [f"{name} {i} " + "fox jumps " * (i % 7) for i in range(20)])
    write_texts(folder / "data" / "cn" / "validation.jsonl", ["the lazy dog", "the quick fox " * 9])
    for name in ("1.parquet", "2.jsonl.gz"):
        (folder / "data" / "en" / name).rename(folder / "data" / "en" / f"train-{name}")
    (folder / "data" / "cn" / "1.txt").rename(folder / "data" / "cn" / "train.txt")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return [
        "data.type=streaming",
        f"data.train_folder={folder / 'data'}",
        f"data.valid_folder={folder / 'data'}",
        "data.valid_every=5",
        f"data.tokenizer_path={folder / 'tokenizer.json'}",
        "data.shuffle_buffer=16",
        "data.global_batch=8",
        "data.num_worker=2",
        "model.vocab_size=256",
    ]
