"""Values that follow from other values, where they are not given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from internlm.config.facts import DEVICE_TYPE, Facts
from internlm.config.schema import Config

ZERO = "hybrid_zero_optimizer"
OVERLAPS = (f"{ZERO}.overlap_sync_grad", f"{ZERO}.overlap_sync_param")


@dataclass(frozen=True)
class Derivation:
    """``target`` is ``value(config, facts)`` where it is not given; None leaves it as it is."""

    target: str
    reads: tuple[str, ...]
    value: Callable[[Config, Facts], Any]


def _head_dim(config: Config, facts: Facts) -> int | None:
    width, rest = divmod(config.model.hidden_size, config.model.num_attention_heads)
    return None if rest else width


def _dtype(config: Config, facts: Facts) -> str:
    return "torch.bfloat16" if facts.device_type == "cuda" else "torch.float32"


def _bucket_size(config: Config, facts: Facts) -> int:
    """An overlap needs several buckets; without one, the fewer the better."""
    zero = config.hybrid_zero_optimizer
    return zero.reduce_bucket_size or (16 if zero.overlap_sync_grad or zero.overlap_sync_param else 512) * 2**20


DERIVATIONS = (
    Derivation("data.valid_micro_num", ("data.micro_num",), lambda config, _: config.data.micro_num),
    Derivation(
        "model.num_kv_attention_heads",
        ("model.num_attention_heads",),
        lambda config, _: config.model.num_attention_heads,
    ),
    Derivation("model.head_dim", ("model.hidden_size", "model.num_attention_heads"), _head_dim),
    Derivation(
        "model.num_chunks", ("parallel.pipeline.mode",), lambda c, _: 2 if c.parallel.pipeline.mode == "ZBV" else None
    ),
    Derivation("model.dtype", (DEVICE_TYPE,), _dtype),
    Derivation(f"{ZERO}.reduce_bucket_size", OVERLAPS, _bucket_size),
    Derivation(f"{ZERO}.all_gather_size", (*OVERLAPS, f"{ZERO}.reduce_bucket_size"), _bucket_size),
    Derivation("lr_scheduler.total_steps", ("data.total_steps",), lambda config, _: config.data.total_steps),
    Derivation("beta2_scheduler.init_beta2", ("adam.adam_beta2",), lambda config, _: config.adam.adam_beta2),
    Derivation("beta2_scheduler.c", ("adam.adam_beta2_c",), lambda config, _: float(config.adam.adam_beta2_c)),
)
