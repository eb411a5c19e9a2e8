"""What is known about a run beside its config.

What this version can't do yet: a table of keys, to be shortened as features arrive.

Settings that are allowed together, but hardly meant: each is worth a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from internlm.config import keys
from internlm.config.dump import values
from internlm.config.schema import Config, OptimizerConfig
from internlm.utils.errors import ConfigError, Problem

#: How rules and derivations say that they read a fact.
WORLD_SIZE = "world_size"
DEVICE_TYPE = "device_type"


@dataclass(frozen=True)
class Facts:
    """Facts of the run; None where not known, and then whatever reads it is skipped."""

    world_size: int | None = None  # processes
    device_type: str | None = None  # "cpu" or "cuda"

    def unknown(self) -> set[str]:
        """Names of the facts that are not known."""
        return {name for name in (WORLD_SIZE, DEVICE_TYPE) if getattr(self, name) is None}


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


class Doubt(NamedTuple):
    """``why`` is said of those of ``keys`` that have another value than by default, where ``arises``. It is a format
    string, for the config ``c``."""

    keys: tuple[str, ...]
    arises: Callable[[Config], bool]
    why: str


def _has_muon(optimizer: OptimizerConfig) -> bool:
    return "Muon" in (optimizer.type, *(group.type for group in optimizer.param_groups))


OF_MUON = ("optimizer.momentum", "optimizer.nesterov", "optimizer.ns_steps", "optimizer.adjust_lr")

DOUBTS = (
    Doubt(
        ("data.pack_sample_into_one",),
        lambda c: not c.data.use_packed_dataset,
        "without effect, since data.use_packed_dataset is False",
    ),
    Doubt(
        ("parallel.pipeline.mode",),
        lambda c: c.parallel.pipeline.size == 1,
        "a pipeline of one stage has nothing to fill, since parallel.pipeline.size is 1",
    ),
    Doubt(
        ("parallel.pipeline.table",),
        lambda c: c.parallel.pipeline.size * c.model.num_chunks == 1,
        "without effect, since the model is in one piece",
    ),
    Doubt(
        ("data.valid_every",),
        lambda c: c.data.valid_folder is None and c.data.train_folder is not None,
        "nothing is validated, since data.valid_folder is not given",
    ),
    Doubt(OF_MUON, lambda c: not _has_muon(c.optimizer), "without effect, since nothing is trained by Muon"),
    Doubt(
        ("model.dropout_selective_checkpoint",),
        lambda c: not c.model.drop_rate,
        "without effect, since model.drop_rate is 0",
    ),
    Doubt(
        ("lr_scheduler.eta_min",),
        lambda c: c.lr_scheduler.type != "constant" and c.lr_scheduler.eta_min > c.adam.lr,
        "the learning rate rises to {c.lr_scheduler.eta_min} after its peak, since adam.lr is {c.adam.lr}",
    ),
)


def doubts(config: Config) -> list[str]:
    """A warning for everything about ``config`` that was hardly meant."""
    given, told = dict(values(config)), []
    for doubt in DOUBTS:
        chosen = [key for key in doubt.keys if given[key] != keys.fields()[key].default]
        if chosen and doubt.arises(config):
            told.append(f"{', '.join(chosen)}: {doubt.why.format(c=config)}")
    return told
