"""Limits of this version: values that are refused, keys without effect, and settings that deserve a warning.

A run refuses settings that would silently change results (:func:`check_runnable`) and warns about settings without
effect (:func:`warnings_about`). The tables shrink as features arrive; a test checks that every key of the schema is
either read somewhere or listed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from internlm.config import keys
from internlm.config.schema import Config, OptimizerConfig
from internlm.utils.errors import ConfigError, Problem

#: Supported values by key; other values need a feature that is not available yet.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
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

#: Keys of folders that must be local.
LOCAL_FOLDERS = ("data.train_folder", "data.valid_folder", "ckpt.save_ckpt_folder", "ckpt.load_ckpt_info.path")
# One letter before the colon is a drive, not a protocol.
REMOTE = re.compile(r"(?!local:)\w{2,}:")


@dataclass(frozen=True)
class NoEffect:
    """Key that is accepted but has no effect in this version.

    ``instead`` describes what happens instead; ``requested(value)`` is True if the value asks for the missing feature.
    """

    key: str
    instead: str
    requested: Callable[[Any], bool] = bool


NO_EFFECT = (
    NoEffect("model.mlp_layer_fusion", "gate and up projections are always one GEMM", lambda fused: not fused),
    NoEffect(
        "model.enable_qkv_fusion", "query, key and value projections are always one GEMM", lambda fused: not fused
    ),
    NoEffect("ckpt.async_upload", "checkpoints are saved synchronously"),
    NoEffect("ckpt.oss_snapshot_freq", "no snapshots are saved between checkpoints"),
    NoEffect("monitor.alert.light_monitor_address", "no heartbeats are sent"),
    # Any kernel gives the result that older configs ask for, so there is nothing to warn about.
    NoEffect("loss.op_type", "the chunked kernel computes the loss", lambda kernel: False),
)

#: Map from an unsupported setting to the keys that only matter with it. No code reads these keys. They need no warning
#: of their own, since the setting is refused or warned about.
UNREAD: dict[str, tuple[str, ...]] = {
    "model.num_experts": (
        "model.top_k",
        "model.moe_type",
        "model.moe_layer_kwargs",
        "loss.moe_loss_coeff",
        "parallel.expert.no_tp",
        "parallel.expert_weight.size",
        "parallel.expert_weight.overlap",
        "parallel.expert_weight.memory_pool",
        "parallel.expert_weight.launch_allgather_before",
        "parallel.expert_weight.forward_overlap_per",
    ),
    "model.use_sliding_window": ("model.sliding_window",),
    "parallel.sequence_2D.enable": (
        "parallel.sequence_2D.head_size",
        "parallel.sequence_2D.context_size",
        "parallel.sequence_2D.window_size",
        "parallel.sequence_2D.device_placement_strategy.head_first",
        "parallel.sequence_2D.device_placement_strategy.interleaved",
    ),
    "data.type": ("data.tokenizer_path", "data.content_name"),
    "ckpt.async_upload": ("ckpt.async_upload_tmp_folder",),
}


def check_runnable(config: Config) -> None:
    """Check that this version supports all settings of ``config``.

    Raises:
        ConfigError: The config has unsupported settings; every one is listed.
    """
    given = dict(keys.values(config))
    problems = [
        Problem(key, f"{given[key]!r} is not available in this version", _use(supported))
        for key, supported in SUPPORTED_VALUES.items()
        if key in given and given[key] not in supported
    ]
    problems += [
        Problem(key, f"{given[key]!r} is not a local folder; remote storage is not supported", "Use a local path")
        for key in LOCAL_FOLDERS
        if REMOTE.match(given.get(key) or "")
    ]
    if problems:
        raise ConfigError(*problems)


def _use(supported: tuple[Any, ...]) -> str:
    named = [value for value in supported if value is not None]
    if not named:
        return "Remove it"
    return f"Use {'one of ' if len(named) > 1 else ''}{', '.join(map(str, named))}"


@dataclass(frozen=True)
class DubiousSetting:
    """Warning about the ``keys`` that differ from their defaults, issued if ``applies(config)`` is True.

    ``message`` is a format string in which ``c`` is the config.
    """

    keys: tuple[str, ...]
    applies: Callable[[Config], bool]
    message: str


def _uses_muon(optimizer: OptimizerConfig) -> bool:
    return "Muon" in (optimizer.type, *(group.type for group in optimizer.param_groups))


MUON_KEYS = ("optimizer.momentum", "optimizer.nesterov", "optimizer.ns_steps", "optimizer.adjust_lr")

DUBIOUS_SETTINGS = (
    DubiousSetting(
        ("data.pack_sample_into_one",),
        lambda c: not c.data.use_packed_dataset,
        "no effect, since data.use_packed_dataset is False",
    ),
    DubiousSetting(
        ("parallel.pipeline.mode",),
        lambda c: c.parallel.pipeline.size == 1,
        "a pipeline with parallel.pipeline.size = 1 has no bubble to reduce",
    ),
    DubiousSetting(
        ("parallel.pipeline.table",),
        lambda c: c.parallel.pipeline.size * c.model.num_chunks == 1,
        "no effect, since there is only one virtual stage",
    ),
    DubiousSetting(
        ("data.valid_every",),
        lambda c: c.data.valid_folder is None and c.data.train_folder is not None,
        "no effect, since data.valid_folder is not given",
    ),
    DubiousSetting(MUON_KEYS, lambda c: not _uses_muon(c.optimizer), "no effect, since Muon updates no parameter"),
    DubiousSetting(
        ("model.dropout_selective_checkpoint",),
        lambda c: not c.model.drop_rate,
        "no effect, since model.drop_rate is 0",
    ),
    DubiousSetting(
        ("lr_scheduler.eta_min",),
        lambda c: c.lr_scheduler.type != "constant" and c.lr_scheduler.eta_min > c.adam.lr,
        "the learning rate rises to {c.lr_scheduler.eta_min} after its peak, since adam.lr is {c.adam.lr}",
    ),
)


def warnings_about(config: Config) -> list[str]:
    """Return warnings: one about all settings without effect in this version, and one per dubious setting."""
    given = dict(keys.values(config))
    idle = [f"{row.key} ({row.instead})" for row in NO_EFFECT if row.requested(given[row.key])]
    warnings = [f"No effect in this version: {', '.join(idle)}"] if idle else []
    for setting in DUBIOUS_SETTINGS:
        changed = [key for key in setting.keys if given[key] != keys.fields()[key].default]
        if changed and setting.applies(config):
            warnings.append(f"{', '.join(changed)}: {setting.message.format(c=config)}")
    return warnings
