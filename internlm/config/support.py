"""Limits of this version: values that are refused, keys without effect, and settings that deserve a warning.

A run refuses settings that would silently change results (:func:`check_runnable`) and warns about settings without
effect (:func:`warnings_about`). The tables shrink as features arrive; a test checks that every key of the schema is
either read somewhere or listed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from internlm.config import keys
from internlm.config.families import FAMILIES
from internlm.config.schema import Config, ModelConfig, OptimizerConfig
from internlm.config.schema.fields import parse_object_address
from internlm.utils.errors import ConfigError, Problem, known_names
from internlm.utils.registry import MODEL_INITIALIZER
from internlm.utils.secrets import mask_credentials

#: Supported values by key; other values need a feature that is not available yet.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "parallel.sequence_2D.enable": (False,),
    "model.num_experts": (1,),
    "model.num_shared_experts": (0,),
    "data.type": ("tokenized", "streaming", "megatron"),
}

#: Built-in model types.
MODEL_TYPES = (*FAMILIES, "hf")

#: Model types of published configs that are not built in, with what they need. A script may register its own.
MISSING_TYPES = {
    **dict.fromkeys(("INTERNLM_MoE", "MIXTRALMOE", "QWEN2MOE", "QWEN3MOE"), "a model with experts"),
    "LLAVA": "a multimodal model",
}

#: Keys of paths that must be local, with the end of the error.
LOCAL_PATHS = {
    "ckpt.stop_file_path": "file",
}
# One letter before the colon is a drive, not a protocol.
REMOTE = re.compile(r"(?!local:)\w{2,}:")
#: Keys of folders that are local or in an object store.
CHECKPOINT_FOLDERS = ("ckpt.save_ckpt_folder", "ckpt.load_ckpt_info.path")


@dataclass(frozen=True)
class NoEffect:
    """Key that is accepted but has no effect in this version.

    ``instead`` describes what happens instead; ``requested(value)`` is True if the value asks for the missing feature.
    """

    key: str
    instead: str
    requested: Callable[[Any], bool] = bool


NO_EFFECT = (
    NoEffect("monitor.alert.light_monitor_address", "no heartbeats are sent"),
    # What it is for is done in another way, so there is nothing to warn about.
    NoEffect("ckpt.async_upload_tmp_folder", "host memory holds what is not written yet", lambda folder: False),
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
    "parallel.sequence_2D.enable": (
        "parallel.sequence_2D.head_size",
        "parallel.sequence_2D.context_size",
        "parallel.sequence_2D.window_size",
        "parallel.sequence_2D.device_placement_strategy.head_first",
        "parallel.sequence_2D.device_placement_strategy.interleaved",
    ),
}


def check_runnable(config: Config) -> None:
    """Check that this version supports all settings of ``config``.

    Raises:
        ConfigError: The config has unsupported settings; every one is listed.
    """
    given = dict(keys.values(config))
    problems = unsupported(given.get)
    problems += [
        Problem(key, f"{mask_credentials(given[key])!r} is not a local {kind}", "Use a local path")
        for key, kind in LOCAL_PATHS.items()
        if REMOTE.match(given.get(key) or "")
    ]
    for key in CHECKPOINT_FOLDERS:
        location = given.get(key) or ""
        if location == "local:":
            problems.append(Problem(key, f"{location!r} names no folder", "Use local:FOLDER or a plain path"))
        try:
            parse_object_address(location)
        except ValueError as error:
            problems.append(Problem(key, str(error)))
    if problems:
        raise ConfigError(*problems)


def unsupported(value_of: Callable[[str], Any], invalid: Collection[str] = ()) -> list[Problem]:
    """Return one problem for each value that needs a feature which is not available.

    Args:
        value_of: Function that returns the value of a dotted key, or None if it is not set.
        invalid: Keys that failed validation, which are left out.
    """
    problems, model_type = [], value_of("model_type")
    if model_type in MISSING_TYPES and model_type not in MODEL_INITIALIZER:
        message = f"{model_type!r}, {MISSING_TYPES[model_type]} that is not available in this version"
        todo = f"{known_names(MODEL_TYPES)} Register a model of your own before initialize_distributed_env"
        problems.append(Problem("model_type", message, todo))
    values = {key: value_of(key) for key in SUPPORTED_VALUES if key not in invalid}
    problems += [
        Problem(key, f"{value!r} is not available in this version", _use(SUPPORTED_VALUES[key]))
        for key, value in values.items()
        if value is not None and value not in SUPPORTED_VALUES[key]
    ]
    return problems


def check_registered(config: Config) -> None:
    """Check that ``config.model_type`` is built in or registered.

    Raises:
        ConfigError: It is neither.
    """
    known = {*MODEL_TYPES, *MODEL_INITIALIZER}
    if config.model_type not in known:
        todo = f"{known_names(known)} A script registers a model of its own before initialize_distributed_env"
        raise ConfigError(Problem("model_type", f"nothing is registered as {config.model_type!r}", todo))


def _use(supported: tuple[Any, ...]) -> str:
    return f"Use {'one of ' if len(supported) > 1 else ''}{', '.join(map(str, supported))}"


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


MUON_KEYS = (
    "optimizer.momentum",
    "optimizer.nesterov",
    "optimizer.ns_steps",
    "optimizer.ns_dtype",
    "optimizer.adjust_lr",
)

BIASES = ("qkv_bias", "o_bias", "mlp_bias")


def _is_overruled(bias: str) -> Callable[[Config], bool]:
    return lambda c: bool(c.model.no_bias and getattr(c.model, bias))


def _turns_by_local_base(model: ModelConfig) -> bool:
    """Return whether all layers have a window and the rotary base of such layers."""
    windows = map(model.window, range(model.num_layers))
    return model.local_rope_base is not None and all(width is not None for width in windows)


ROTARY_KEYS = tuple(
    f"model.{name}" for name in ("rope_base", "use_dynamic_ntk_rope", "rope_scaling_factor", "rope_scaling")
)

STREAM_KEYS = (
    *("data.content_name", "data.subset", "data.train_split", "data.valid_split"),
    *("data.stream_shards", "data.shuffle_buffer", "data.on_bad_row"),
)

DUBIOUS_SETTINGS = (
    DubiousSetting(STREAM_KEYS, lambda c: c.data.type != "streaming", "no effect, since data.type is not 'streaming'"),
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
        ("model.sliding_window", "model.global_layers", "model.local_rope_base"),
        lambda c: not c.model.use_sliding_window,
        "no effect, since model.use_sliding_window is False",
    ),
    DubiousSetting(
        ROTARY_KEYS,
        lambda c: _turns_by_local_base(c.model),
        "no effect, since all layers have a window, and model.local_rope_base is set",
    ),
    DubiousSetting(
        ("model.out_head_init_std",),
        lambda c: c.model.tie_word_embeddings,
        "no effect, since model.tie_word_embeddings is True: model.embedding_init_std applies",
    ),
    DubiousSetting(
        ("model.embed_grad_scale",),
        lambda c: c.model.lora is not None,
        "no effect, since model.lora freezes the embedding",
    ),
    DubiousSetting(
        ("model.top_k", "model.moe_type", "model.moe_layer_kwargs"),
        lambda c: c.model.num_experts == 1,
        "no effect, since model.num_experts is 1",
    ),
    *(
        DubiousSetting((f"model.{key}",), _is_overruled(key), "no effect, since model.no_bias is True")
        for key in BIASES
    ),
    DubiousSetting(
        ("ckpt.save_ckpt_folder", "ckpt.oss_snapshot_freq", "ckpt.keep_last", "ckpt.enable_internevo2hf_ckpt"),
        # If saving is switched off beside an interval, this is meant.
        lambda c: not c.ckpt.enable_save_ckpt and c.ckpt.checkpoint_every is None,
        "nothing is saved, since neither ckpt.checkpoint_every nor ckpt.enable_save_ckpt is set",
    ),
    DubiousSetting(
        ("ckpt.keep_every",),
        lambda c: c.ckpt.keep_last is None,
        "no effect, since ckpt.keep_last is not set: all checkpoints are kept",
    ),
    DubiousSetting(
        ("lr_scheduler.eta_min",),
        lambda c: c.lr_scheduler.type != "constant" and c.lr_scheduler.eta_min > c.adam.lr,
        "the learning rate rises to {c.lr_scheduler.eta_min} after its peak, since adam.lr is {c.adam.lr}",
    ),
)


#: Stands for a section that is set, of which a config holds only the keys.
SET = object()


def warnings_about(config: Config, ignored: Sequence[str] = (), derived: Collection[str] = ()) -> list[str]:
    """Return warnings: one about all settings without effect in this version, and one per dubious setting.

    Args:
        config: Resolved config.
        ignored: Keys without a field in the schema that were dropped, each with the reason.
        derived: Keys whose values nobody has given.
    """
    given = dict(keys.values(config))
    idle = [f"{row.key} ({row.instead})" for row in NO_EFFECT if row.requested(given[row.key])]
    without_effect = ", ".join([*ignored, *idle])
    warnings = [f"No effect in this version: {without_effect}"] if without_effect else []
    for setting in DUBIOUS_SETTINGS:
        given_keys = [key for key in setting.keys if key not in derived]
        changed = [key for key in given_keys if given.get(key, SET) != keys.fields()[key].default]
        if changed and setting.applies(config):
            warnings.append(f"{', '.join(changed)}: {setting.message.format(c=config)}")
    return warnings
