"""Settings that have changed between a save and the run that continues from it, for the log."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from pydantic import ValidationError

from internlm.checkpoint.compatibility import MATHEMATICS, has_effect, with_family_defaults
from internlm.checkpoint.run_state import RunState, current_versions
from internlm.config import keys, nested_dict
from internlm.config.nested_dict import ABSENT
from internlm.config.schema import AdamConfig, LRSchedulerConfig
from internlm.config.schema.fields import Section
from internlm.solver.lr_schedules import LRSchedule
from internlm.utils.errors import Problem
from internlm.utils.logger import get_logger

log = get_logger()

S = TypeVar("S", bound=Section)

#: Keys and sections without effect on the results of a run that continues, beyond the order in which floating-point
#: numbers are summed: layout, kernels, speed, initial values, records. Every other key is compared.
WITHOUT_EFFECT = frozenset(
    {
        "JOB_NAME",
        "log_folder",
        "tensorboard_folder",
        "enable_tb",
        "ckpt",
        "monitor",
        "parallel",
        "cudnn_deterministic",
        "cudnn_benchmark",
        "data.train_folder",  # its fingerprint is compared
        "data.valid_folder",
        "data.valid_split",
        "data.valid_every",
        "data.valid_max_batches",
        "data.valid_micro_num",
        "data.micro_num",  # of one rank; the global batch is compared
        "data.global_batch",
        "data.stream_shards",  # compared when the rows are resumed
        "data.num_worker",
        "data.use_shm",
        "data.shm_path",
        "data.empty_cache_and_diag_interval",
        "data.diag_outlier_ratio",
        "hybrid_zero_optimizer.overlap_sync_grad",
        "hybrid_zero_optimizer.overlap_sync_param",
        "hybrid_zero_optimizer.reduce_bucket_size",
        "hybrid_zero_optimizer.all_gather_size",
        "hybrid_zero_optimizer.use_split_tensor_optim",
        "hybrid_zero_optimizer.max_skipped_steps",
        "grad_scaler.fp16.initial_scale",
        "loss.op_type",
        "model.num_chunks",
        "model.checkpoint",
        "model.cpu_offloading",
        "model.dropout_selective_checkpoint",
        "model.compile",
        "model.use_flash_attn",
        "model.attention_backend",
        "model.parallel_output",
        "model.embed_split_hidden",
        "model.use_scaled_init",
        "model.embedding_init_std",
        "model.attn_wqkv_init_std",
        "model.attn_other_init_std",
        "model.ffn_uplayer_init_std",
        "model.ffn_other_init_std",
        "model.out_head_init_std",
    }
)
#: Name of a setting that follows from several keys.
GLOBAL_BATCH = "micro-batches of a global batch"
#: Least relative change of the learning rate that is a jump.
_JUMP = 0.01


def log_changes(where: str, saved: RunState, run_info: Mapping[str, Any], content: Collection[str]) -> None:
    """Log on rank 0 each setting with an effect on results that has changed since a checkpoint was saved.

    Args:
        where: Checkpoint, for the log.
        saved: Its state.
        run_info: Resolved ``config`` and ``seed`` of the run.
        content: Content that was loaded. Without schedule and data position it is a new run, of which only changes of
            the model are logged.
    """
    if dist.get_rank() == 0:
        for level, line in lines_to_log(where, saved, run_info, content, dist.get_world_size()):
            log.log(level, line)


def log_allowed(differences: Iterable[Problem]) -> None:
    """Log on rank 0 each difference of the data that ``ckpt.allow_data_changes`` permits."""
    for difference in differences if dist.get_rank() == 0 else ():
        log.warning(f"{difference.where}: {difference.message}. As ckpt.allow_data_changes=True permits, rows go on")


def lines_to_log(
    where: str, saved: RunState, run_info: Mapping[str, Any], content: Collection[str], world_size: int
) -> Iterator[tuple[int, str]]:
    """Yield level and text of the lines that :func:`log_changes` logs."""
    continues = not {"scheduler", "sampler"}.isdisjoint(content)
    changes = changed_settings(saved, run_info, world_size)
    for key, change in changes.items():
        if continues or key.removeprefix("model.") in MATHEMATICS:
            line = f"changed since {where} was saved: {key}: {change}"
            if key == GLOBAL_BATCH:
                # Easily overlooked: with another tensor size, each of the fewer data ranks has as many as before.
                yield logging.WARNING, f"{line}. Set data.global_batch to keep it on any number of ranks"
            else:
                yield logging.INFO, line
    if continues and (jump := learning_rate_jump(saved, run_info["config"])):
        causes = [key for key in changes if key == "adam.lr" or key.startswith("lr_scheduler.")]
        yield logging.WARNING, f"{jump}, because of another {' and '.join(causes) or 'schedule'}"


def changed_settings(saved: RunState, run_info: Mapping[str, Any], world_size: int) -> dict[str, str]:
    """Return ``old → new`` for each setting with an effect on results that differs.

    A setting that another version did not save, or no longer has, is no difference.
    """
    now = run_info["config"]
    rows = [
        *_config_values(saved.config, now),
        ("--seed", saved.seed, run_info["seed"]),
        (
            GLOBAL_BATCH,
            _global_batch(saved.config, saved.world_size or 0) or ABSENT,
            _global_batch(now, world_size) or ABSENT,
        ),
        *((f"version of {name}", saved.versions.get(name, ABSENT), version) for name, version in _rounding_versions()),
    ]
    return {
        key: f"{keys.format_value(key, old)} → {keys.format_value(key, new)}"
        for key, old, new in rows
        if ABSENT not in (old, new) and old != new
    }


def learning_rate_jump(saved: RunState, now: Mapping[str, Any]) -> str:
    """Describe the step of the learning rate at which a run continues with another schedule; "" if there is none.

    Args:
        saved: State of the checkpoint.
        now: Config of the run.
    """
    step, old, new = saved.train_state.step, _lr_schedule(saved.config), _lr_schedule(now)
    if old is None or new is None or abs(new(step) - old(step)) <= _JUMP * max(new(step), old(step)):
        return ""
    return f"the learning rate jumps from {old(max(step - 1, 0)):.4g} to {new(step):.4g} at step {step}"


def _config_values(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key with an effect on results, its saved value, and that of the run."""
    saved, now = with_family_defaults(saved, now)
    models = [config["model"] for config in (saved, now)]
    for key in keys.fields():
        if keys.is_section(key) or keys.is_of_list(key) or nested_dict.within(key, WITHOUT_EFFECT):
            continue
        if has_effect(key.removeprefix("model."), *models):
            yield key, nested_dict.get(saved, key, ABSENT), nested_dict.get(now, key, ABSENT)


def _global_batch(config: Mapping[str, Any], world_size: int) -> int | None:
    """Return the number of micro-batches of a step on all ranks, or None if the config does not say."""
    given, micro_bsz = (nested_dict.get(config, key, None) for key in ("data.global_batch", "data.micro_bsz"))
    if type(given) is int and type(micro_bsz) is int and micro_bsz > 0:
        return given // micro_bsz
    sizes = [nested_dict.get(config, key) for key in ("parallel.tensor.size", "parallel.pipeline.size")]
    micro_num = nested_dict.get(config, "data.micro_num")
    if not all(type(size) is int and size > 0 for size in (*sizes, micro_num)):
        return None
    return int(micro_num * (world_size // (sizes[0] * sizes[1])))


def _rounding_versions() -> list[tuple[str, str]]:
    """Return the versions of packages whose kernels may round differently."""
    return [(name, version) for name, version in current_versions().items() if name != "python"]


def _lr_schedule(config: Mapping[str, Any]) -> LRSchedule | None:
    """Return the schedule of a config, which another version may have saved; None if it is incomplete."""
    lr, adam = _section(LRSchedulerConfig, config, "lr_scheduler"), _section(AdamConfig, config, "adam")
    return LRSchedule.from_config(lr, adam) if lr and adam and lr.total_steps else None


def _section(section: type[S], config: Mapping[str, Any], name: str) -> S | None:
    """Validate a section, without the keys that this version lacks; None if it is invalid."""
    content = config.get(name)
    if not isinstance(content, dict):
        return None
    try:
        return section.model_validate({key: content[key] for key in section.model_fields if key in content})
    except ValidationError:
        return None
