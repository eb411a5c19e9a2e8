"""Configs of a comparison: one for several ranks, one for a single process with the same model and global batch.

:func:`debug_size` shrinks the model, the batch and the number of steps of a config, and keeps its parallel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm import accelerator
from internlm.accelerator import CPU, kind_of
from internlm.config import Config, check_runnable, resolve
from internlm.config.schema.fields import Rampup, parse_rampup
from internlm.core.context.parallel_context import sizes_of
from internlm.utils.errors import ConfigError, Problem

LAYERS = 2  # smallest number with a next layer, whose weights can be prefetched
HEAD_DIM = 16
#: Vocabulary size; odd, so that no tensor size divides it.
VOCABULARY = 67
SEQ_LEN = 32
STEPS = 20
#: Largest number of query heads per key/value head.
MOST_QUERIES = 4


def debug_size(config: Config) -> dict[str, Any]:
    """Return overrides, by config key, that shrink ``config`` as far as its parallel sizes allow.

    They also select random data and a run of ``STEPS`` steps.
    """
    return {**_model(config), **_pipeline(config), **_data(config), **_course()}


def _model(config: Config) -> dict[str, Any]:
    model, tensor = config.model, config.parallel.tensor.size
    kv_heads, queries = _heads(config)
    heads = kv_heads * queries
    # Some families have heads whose sizes do not add up to the hidden size, a separate path in attention.
    usual = model.num_attention_heads * model.head_size == model.hidden_size
    position_scale, seq_len = model.max_position_embeddings / config.data.seq_len, _seq_len(config)
    layers = max(LAYERS, config.parallel.pipeline.size * model.num_chunks)
    return {
        "model.num_layers": layers,
        # One of the layers that attend to all tokens is enough, and a window hides mistakes unless it is short.
        **({"model.global_layers": (layers - 1,)} if model.global_layers else {}),
        **({"model.sliding_window": min(model.sliding_window, seq_len // 2)} if model.sliding_window else {}),
        "model.cpu_offloading": min(model.cpu_offloading, 1),
        "model.num_attention_heads": heads,
        "model.num_kv_attention_heads": kv_heads,
        "model.head_dim": HEAD_DIM,
        "model.hidden_size": heads * HEAD_DIM * (1 if usual else 2),
        "model.multiple_of": math.lcm(8, tensor),
        "model.vocab_size": VOCABULARY,
        "model.max_position_embeddings": max(1, int(seq_len * position_scale)),
    }


def _heads(config: Config) -> tuple[int, int]:
    """Return the number of key/value heads, and of query heads per key/value head, for :func:`debug_size`.

    Their product is divisible by the tensor-parallel size. A number greater than one in ``config`` stays greater than
    one, so that grouped-query attention stays grouped.
    """
    kv_heads, tensor = config.model.kv_heads, config.parallel.tensor.size
    queries = config.model.num_attention_heads // kv_heads
    few = min(kv_heads, max(2, tensor))
    unit = tensor // math.gcd(few, tensor)  # only isp lets several ranks share a key/value head
    return few, max(unit, min(queries, MOST_QUERIES) // unit * unit)


def _seq_len(config: Config) -> int:
    return math.lcm(SEQ_LEN, config.parallel.tensor.size)


def _pipeline(config: Config) -> dict[str, Any]:
    # Explicit layer counts and a schedule table fit only the original numbers of layers and micro-batches.
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
        "data.global_batch": None,
        "data.valid_micro_num": None,
        "data.rampup_batch_size": "",
        "data.total_steps": STEPS,
    }


def _course() -> dict[str, Any]:
    return {"lr_scheduler.total_steps": STEPS, "lr_scheduler.init_steps": 0}


Values = Mapping[str, Any]
#: Largest default world size that results from doubling for data parallelism.
MANY_RANKS = 8

#: Values that switch off everything around training: checkpoints, alerts, validation, TensorBoard.
OFF: Values = {
    "ckpt.enable_save_ckpt": False,
    "ckpt.save_ckpt_folder": None,
    "ckpt.load_ckpt_info": None,
    "ckpt.load_ckpt_folder": None,
    "ckpt.load_model_only_folder": None,
    "monitor.alert.enable_feishu_alert": False,
    "monitor.alert.alert_file_path": None,
    "data.valid_every": 0,
    "data.valid_folder": None,
    "data.num_worker": 0,
    "enable_tb": False,
}

#: Default values on accelerators, where kernels may otherwise add gradients in any order: ranks with the same inputs
#: would differ in the last bits.
ON_ACCELERATORS: Values = {"cudnn_deterministic": True}

#: Values for one process without parallelism or compilation.
ALONE: Values = {
    "parallel.tensor.size": 1,
    "parallel.tensor.mode": "mtp",
    "parallel.pipeline.size": 1,
    "parallel.pipeline.mode": "1F1B",
    "parallel.pipeline.partition": "uniform",
    "parallel.pipeline.table": None,
    "parallel.weight.size": 1,
    "parallel.zero1.size": 1,
    "parallel.zero1.fsdp": False,
    "parallel.expert.size": 1,
    "parallel.expert_weight.size": 1,
    "parallel.sequence_2D.enable": False,
    "parallel.elastic": (),
    "model.num_chunks": 1,
    "model.compile": False,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Configs of the ranks and of the one-process reference, with sizes, steps and seed."""

    config: Config
    world_size: int
    data_size: int
    """Data-parallel size: number of ranks that read different samples."""
    reference: Config
    steps: int
    seed: int = 1024
    device_type: str = CPU.name


@dataclass(frozen=True)
class Devices:
    """Type of the devices on which the processes of a comparison compute, and their number."""

    type: str = CPU.name
    count: int | None = None
    """Number of devices of this machine, each for one process; None on the CPU, whose cores processes share."""

    @classmethod
    def of_this_machine(cls, device_type: str) -> Devices:
        """Find the devices of ``device_type`` that this process can use.

        Raises:
            ConfigError: There is none.
        """
        if reason := accelerator.why_no_device(device_type):
            raise ConfigError(Problem("--device", f"{device_type!r} cannot be used: {reason}", f"Use {CPU.name!r}"))
        return cls(device_type, None if kind_of(device_type).is_host else accelerator.device_count())


HOST_CORES = Devices()


def make_plan(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    *,
    steps: int = 3,
    dtype: str = "float64",
    shrink: bool = False,
    devices: Devices = HOST_CORES,
) -> Plan:
    """Resolve a config for several ranks of this machine and for one process.

    Args:
        source: Path of a config file, or a dict of config keys.
        overrides: Overrides ``KEY=VALUE``, which take precedence over ``dtype`` and the debug size.
        world_size: Number of ranks (default: :func:`default_world_size`).
        steps: Number of steps to train.
        dtype: Dtype name of parameters and activations.
        shrink: Whether to shrink the config (:func:`debug_size`).
        devices: Devices on which all processes compute.

    Raises:
        ConfigError: The config is invalid, or does not fit the devices, the world size or the steps.
    """
    # Resolve several times: the debug sizes depend on resolved sizes, and the default world size on the debug sizes.
    defaults = {"model.dtype": f"torch.{dtype}", **({} if kind_of(devices.type).is_host else ON_ACCELERATORS)}
    common = [*as_overrides(defaults), *overrides, *as_overrides(OFF)]
    config = resolve(source, common, device_type=devices.type).config
    if shrink:
        common = [*as_overrides(debug_size(config)), *common]
        config = resolve(source, common, device_type=devices.type).config
    world_size = world_size or default_world_size(config, devices.count)
    if devices.count is not None and world_size > devices.count:
        message = f"{world_size} processes need a device each, but this machine has {devices.count} ({devices.type})"
        todo = f"Lower it or the parallel sizes, or use --device {CPU.name}"
        raise ConfigError(Problem("--world", message, todo))
    config = resolve(source, common, world_size, devices.type).config
    check_runnable(config)
    if steps > config.data.total_steps:
        message = f"must be at most data.total_steps = {config.data.total_steps}, got {steps}"
        raise ConfigError(Problem("--steps", message, "Lower --steps or raise data.total_steps"))
    data_size = sizes_of(config, world_size).data
    return Plan(
        config=config,
        world_size=world_size,
        data_size=data_size,
        reference=reference_of(config, data_size, devices.type),
        steps=steps,
        device_type=devices.type,
    )


def default_world_size(config: Config, devices: int | None = None) -> int:
    """Return the smallest valid world size, doubled for data parallelism unless that is more than the devices.

    Without ``devices`` it is doubled up to ``MANY_RANKS``.
    """
    parallel = config.parallel
    isp = parallel.tensor.mode == "isp"
    sharing_state = (parallel.weight.size if isp else parallel.tensor.size) * max(parallel.zero1.size, 1)
    smallest = parallel.pipeline.size * math.lcm(parallel.tensor.size, sharing_state)
    return 2 * smallest if 2 * smallest <= (MANY_RANKS if devices is None else devices) else smallest


def reference_of(config: Config, data_size: int, device_type: str = CPU.name) -> Config:
    """Return the resolved config for one process, with the model and the global batch of ``config``.

    Args:
        config: Resolved config of the ranks.
        data_size: Number of data-parallel ranks of ``config``.
        device_type: Type of the device of the process.
    """
    rampup = parse_rampup(config.data.rampup_batch_size)
    batch = {"data.micro_num": config.data.step_rows(data_size), "data.global_batch": None}
    ramp = {"data.rampup_batch_size": _scaled(rampup, data_size)} if rampup else {}
    return resolve(config.model_dump(), as_overrides({**ALONE, **batch, **ramp}), 1, device_type).config


def _scaled(rampup: Rampup, factor: int) -> str:
    return f"{rampup.start * factor} {rampup.increment * factor} {rampup.every}"


def as_overrides(values: Values) -> list[str]:
    """Format a mapping of config keys to values as ``KEY=VALUE`` overrides."""
    return [f"{key}={value!r}" for key, value in values.items()]
