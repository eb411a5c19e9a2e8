"""Configs for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm.config import resolve
from internlm.config.nested_dict import NestedDict, plain, put
from internlm.utils.errors import ConfigError, Problem

ROOT = Path(__file__).parents[3]
SHIPPED = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py"))

SMALLEST: NestedDict = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 100},
    "data": {"seq_len": 16, "micro_bsz": 2, "micro_num": 4, "total_steps": 100},
    "adam": {"lr": 1e-3},
}

#: Every feature switched on, consistent for 8 processes: isp over 2 x 2 stages, interleaved, experts.
BUSIEST: Mapping[str, Any] = {
    "model.num_chunks": 2,
    "model.num_kv_attention_heads": 4,
    "model.num_experts": 4,
    "model.dtype": "torch.float32",
    "parallel.tensor": {"size": 2, "mode": "isp"},
    "parallel.pipeline": {"size": 2, "partition": (1, 1, 1, 1)},
    "parallel.weight.size": 2,
    "parallel.zero1.size": 2,
    "parallel.expert.size": 2,
    "parallel.sequence_2D": {"enable": True, "head_size": 2},
    "data.skip_batches": "0-3,7",
    "data.rampup_batch_size": "2 2 10",
    "data.global_batch": 16,
    "lr_scheduler": {"init_steps": 5, "warmup_ratio": 0.1},
    "ckpt": {"enable_save_ckpt": True, "save_ckpt_folder": "ckpts", "checkpoint_every": 10},
    "monitor.alert": {"enable_feishu_alert": True, "feishu_alert_address": "http://localhost"},
}


def config_of(changes: Mapping[str, Any]) -> NestedDict:
    """Return the smallest config with ``changes``, given by dotted key."""
    tree = plain(SMALLEST)
    for key, value in changes.items():
        put(tree, key, plain(value))
    return tree


def found(changes: Mapping[str, Any], overrides: Sequence[str] = (), **run: Any) -> Sequence[Problem]:
    """Return the problems of the smallest config after ``changes`` and ``overrides``."""
    try:
        resolve(config_of(changes), overrides, **run)
    except ConfigError as error:
        return error.problems
    return ()


def problems_of(changes: Mapping[str, Any], **run: Any) -> list[str]:
    """Return the problems of the smallest config after ``changes``, as users see them."""
    return list(map(str, found(changes, **run)))


def python_blocks(markdown: str) -> Iterator[str]:
    """Yield the Python code blocks of a page."""
    for block in markdown.split("```python\n")[1:]:
        yield block.partition("```")[0]
