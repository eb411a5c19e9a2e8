"""Build the model that the config names, with this rank's shards of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from internlm import accelerator
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.random import derived_seed
from internlm.core.parallel.blocks import declared_blocks
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.layers import widen_norms
from internlm.core.parallel.param_state import deferred_memory
from internlm.core.parallel.sharding import GroupPosition, Sharding, StageLayers, building
from internlm.costs.stages import stage_layers_of
from internlm.model.decoder import Decoder
from internlm.model.registry import is_built_in, model_initializer, register_model_initializer
from internlm.train.memory_check import check_memory
from internlm.utils.dtype import default_dtype, torch_dtype
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.logger import get_logger


def create_model(model_type: str | None = None, *, deferred: bool = False, trains: bool = True) -> nn.Module:
    """Build the model of the global config, with initial values drawn from the run's seed.

    Args:
        model_type: Registered name of the model type; default: ``model_type`` of the config.
        deferred: Under ``parallel.zero1.fsdp``, or if the model is not trained, leave the parameters of a built-in
            model on the meta device. :func:`initialize_model_and_parallel_communicator` then allocates and initialises
            this rank's shards only. Do not set it in a script that sets parameter values before that call.
        trains: Whether the model is trained. False: it is only evaluated, which needs less memory.

    Raises:
        ConfigError: The run needs more memory than is free, or the model was not built for this rank's stage.
    """
    config, name = gpc.config, model_type or gpc.config.model_type
    sharding = Sharding(config.parallel.tensor.mode, _position(ParallelMode.TENSOR), _position(ParallelMode.WEIGHT))
    register_model_initializer()
    # Without fsdp a rank keeps all the memory that it allocates here, so deferring would save none, but a model that is
    # not trained is loaded, and needs no initial values. A user's function may read or move the parameters that it
    # creates, so these must not be on the meta device.
    deferred = deferred and (config.parallel.zero1.fsdp or not trains) and is_built_in(name)
    if name == config.model_type:
        stage, zero_rank = gpc.get_local_rank(ParallelMode.PIPELINE), gpc.get_local_rank(ParallelMode.ZERO1)
        check_memory(config, dist.get_world_size(), stage, zero_rank, trains=trains)
    model = build_model(config, gpc.seed, name, sharding, own_stage_layers(), deferred=deferred)
    check_stage(model, name)
    _warn_of_keys_without_effect(model, name)
    return model


def build_model(
    config: Config,
    seed: int,
    model_type: str | None = None,
    sharding: Sharding | None = None,
    stage_layers: StageLayers | None = None,
    *,
    deferred: bool = False,
) -> nn.Module:
    """Build the model of ``config`` on the current device, with initial values drawn from ``seed``.

    Args:
        config: Resolved config.
        seed: Seed of the run.
        model_type: Registered name of the model type; default: ``config.model_type``.
        sharding: Parallel mode, and this rank's position in its groups; default: no parameter is split.
        stage_layers: Layers of this rank's pipeline stage; default: all layers.
        deferred: Leave the parameters of parallel layers on the meta device, without values.

    Raises:
        ConfigError: No model type of this name is registered, or its function does not take the config's section
            ``model`` and return a module.
    """
    register_model_initializer()
    name = model_type or config.model_type
    build = model_initializer.get_module(name)
    _check_takes_section(name, build)
    assert config.model.dtype is not None, "the resolver fills model.dtype"
    dtype = torch_dtype(config.model.dtype)
    # TF32 is a precision of float32 matrix products, not a dtype: parameters are float32.
    if config.model.dtype == "torch.tf32":
        torch.set_float32_matmul_precision("high")
    device = accelerator.current_device()
    # Fork the generators, so that building a model does not advance those of the caller.
    randomness = accelerator.fork_rng()
    memory = deferred_memory() if deferred else nullcontext()
    with randomness, default_dtype(dtype), device, building(sharding or Sharding(), stage_layers), memory:
        torch.manual_seed(derived_seed(seed, "model"))  # for models that draw their own values
        model: nn.Module = build(config.model)
    if not isinstance(model, nn.Module):
        message = f"the function of {name!r} returned {type(model).__name__}, which is no module"
        raise ConfigError(Problem("model_type", message, "Return an nn.Module"))
    if config.use_fp32_norm:
        widen_norms(model)
    if not deferred:
        initialize_parameters(model, seed)
    return model


def _check_takes_section(name: str, build: Callable[..., nn.Module]) -> None:
    """Check that ``build`` can be called with one argument.

    Raises:
        ConfigError: It takes none, or requires others.
    """
    signature = inspect.signature(build)
    try:
        signature.bind(None)
    except TypeError:
        message = f"expected a function of one argument for {name!r}, the config's section model, got {signature}"
        todo = "Take the section, and read such values as config.hidden_size from it"
        raise ConfigError(Problem("model_type", message, todo)) from None


def own_stage_layers() -> StageLayers:
    """Return the layers of this rank's pipeline stage."""
    return stage_layers_of(gpc.config, gpc.get_local_rank(ParallelMode.PIPELINE))


def check_stage(model: nn.Module, name: str) -> None:
    """Check that ``model`` was built for this rank's pipeline stage and its chunks.

    Args:
        model: Model to check.
        name: Name of the model, for the error.

    Raises:
        ConfigError: The model has the layers of another stage, or does not support pipeline stages.
    """
    expected = own_stage_layers()
    if len(expected.chunks) == 1 and expected.is_whole:
        return
    if getattr(model, "stage_layers", None) != expected:
        sizes = f"parallel.pipeline.size={gpc.config.parallel.pipeline.size}, model.num_chunks={len(expected.chunks)}"
        message = f"{name!r} was not built for {sizes}: its stage_layers differ from those of this rank"
        todo = "Build it with internlm.core.parallel.current_stage_layers, or set parallel.pipeline.size and "
        raise ConfigError(Problem("model_type", message, f"{todo}model.num_chunks to 1"))


def _position(mode: ParallelMode) -> GroupPosition:
    return GroupPosition(gpc.get_local_rank(mode), gpc.get_world_size(mode))


def _warn_of_keys_without_effect(model: nn.Module, name: str) -> None:
    """Log a warning for config keys that have no effect on a user's own model."""
    if isinstance(model, Decoder) or gpc.get_global_rank() != 0:
        return
    config, blocks = gpc.config.model, declared_blocks(model)
    inside = config.checkpoint == "selective"  # recomputed inside attention; other values wrap whole blocks
    ignored = {
        "checkpoint": bool(config.checkpoint) and (inside or not blocks),
        "cpu_offloading": bool(config.cpu_offloading) and not blocks,
        "drop_rate": bool(config.drop_rate),
    }
    keys = ", ".join(f"model.{key}" for key, is_ignored in ignored.items() if is_ignored)
    if keys:
        get_logger().warning(f"{keys}: ignored, unless the model {name!r} implements this itself")
