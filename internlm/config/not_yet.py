"""What this version can't do yet: a table of keys, to be shortened as features arrive."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from internlm.config.dump import values
from internlm.config.schema import Config
from internlm.utils.errors import ConfigError, Problem

#: Keys whose other values would change results or can't be honoured, with the values that can.
ONLY: dict[str, tuple[Any, ...]] = {
    "parallel.sequence_2D.enable": (False,),
    "model.num_experts": (1,),
    "model.num_shared_experts": (0,),
    "model.apply_post_layer_norm": (False,),
    "model.residual_in_fp32": (False,),
    "model.use_sliding_window": (False,),
    "model.norm_head": (False,),
    "data.type": ("tokenized",),
    "ckpt.load_ckpt_info.ckpt_type": ("internevo",),
    "ckpt.stop_file_path": (None,),
    "ckpt.enable_internevo2hf_ckpt": (False,),
}

#: Keys that name a folder, which must be a local one.
FOLDERS = ("data.train_folder", "data.valid_folder", "ckpt.save_ckpt_folder", "ckpt.load_ckpt_info.path")
REMOTE = re.compile(r"(?!local:)\w{2,}:")


@dataclass(frozen=True)
class NoEffect:
    """A key that is accepted and does nothing yet, where ``asked`` says that it asks for something."""

    key: str
    instead: str
    asked: Callable[[Any], bool] = bool


NO_EFFECT = (
    NoEffect("model.mlp_layer_fusion", "gate and up projection are one product", lambda fused: not fused),
    NoEffect("model.enable_qkv_fusion", "query, key and value projection are one product", lambda fused: not fused),
    NoEffect("ckpt.async_upload", "saving is synchronous"),
    NoEffect("ckpt.oss_snapshot_freq", "no snapshots are saved between checkpoints"),
    NoEffect("monitor.alert.light_monitor_address", "no heartbeats are sent"),
)


def check_runnable(config: Config) -> None:
    """Raise :class:`ConfigError` naming every setting that this version can't run."""
    given = dict(values(config))
    problems = [
        Problem(key, f"{given[key]!r} is not available in this version", _use(allowed))
        for key, allowed in ONLY.items()
        if key in given and given[key] not in allowed
    ]
    problems += [
        Problem(
            key,
            f"{given[key]!r} is not a local folder, and others are not available in this version",
            "Use a local folder",
        )
        for key in FOLDERS
        if REMOTE.match(given.get(key) or "")
    ]
    if problems:
        raise ConfigError(*problems)


def without_effect(config: Config) -> list[str]:
    """At most one warning, that names every setting that is accepted but does nothing yet."""
    given = dict(values(config))
    idle = [f"{row.key} ({row.instead})" for row in NO_EFFECT if row.asked(given[row.key])]
    return [f"Without effect in this version: {', '.join(idle)}"] if idle else []


def _use(allowed: tuple[Any, ...]) -> str:
    named = [value for value in allowed if value is not None]
    if not named:
        return "Remove it"
    return f"Use {'one of ' if len(named) > 1 else ''}{', '.join(map(str, named))}"
