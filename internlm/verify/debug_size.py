"""A config made tiny, its architecture kept: what is a ratio or a kind stays, what is a size shrinks."""

from __future__ import annotations

import math
from typing import Any

from internlm.config import Config

LAYERS = 2
HEAD_DIM = 16
#: Odd, so that no tensor size divides it.
VOCABULARY = 67
SEQ_LEN = 32
STEPS = 20
#: Query heads per key/value head, where there are more.
MOST_QUERIES = 4


def debug_size(config: Config) -> dict[str, Any]:
    """Values by key that make ``config`` tiny, for the parallel sizes that it has: random data, a short run."""
    return {**_model(config), **_pipeline(config), **_data(config), **_course()}


def _model(config: Config) -> dict[str, Any]:
    model, tensor = config.model, config.parallel.tensor.size
    kv_heads, queries = _heads(config)
    heads = kv_heads * queries
    usual = model.num_attention_heads * model.head_size == model.hidden_size
    position_scale = model.max_position_embeddings / config.data.seq_len
    return {
        "model.num_layers": max(LAYERS, config.parallel.pipeline.size * model.num_chunks),
        "model.cpu_offloading": min(model.cpu_offloading, 1),
        "model.num_attention_heads": heads,
        "model.num_kv_attention_heads": kv_heads,
        "model.head_dim": HEAD_DIM,
        "model.hidden_size": heads * HEAD_DIM * (1 if usual else 2),
        "model.multiple_of": math.lcm(8, tensor),
        "model.vocab_size": VOCABULARY,
        "model.max_position_embeddings": max(1, int(_seq_len(config) * position_scale)),
    }


def _heads(config: Config) -> tuple[int, int]:
    """Key/value heads, and query heads for each: as few as the tensor size allows, more than one of what was more."""
    kv_heads, tensor = config.model.kv_heads, config.parallel.tensor.size
    queries = config.model.num_attention_heads // kv_heads
    few = min(kv_heads, max(2, tensor))
    unit = tensor // math.gcd(few, tensor)  # of isp, where a key/value head is sent to several ranks
    return few, max(unit, min(queries, MOST_QUERIES) // unit * unit)


def _seq_len(config: Config) -> int:
    return math.lcm(SEQ_LEN, config.parallel.tensor.size)


def _pipeline(config: Config) -> dict[str, Any]:
    """What was written for another number of layers, or of micro-batches, goes."""
    partition = config.parallel.pipeline.partition
    return {
        "parallel.pipeline.partition": partition if isinstance(partition, str) else "uniform",
        "parallel.pipeline.table": None,
    }


def _data(config: Config) -> dict[str, Any]:
    return {
        "data.type": "tokenized",
        "data.train_folder": None,
        "data.seq_len": _seq_len(config),
        "data.micro_bsz": min(config.data.micro_bsz, 2),
        "data.micro_num": max(2, config.parallel.pipeline.size),
        "data.valid_micro_num": None,
        "data.rampup_batch_size": "",
        "data.total_steps": STEPS,
    }


def _course() -> dict[str, Any]:
    return {"lr_scheduler.total_steps": STEPS, "lr_scheduler.init_steps": 0}
