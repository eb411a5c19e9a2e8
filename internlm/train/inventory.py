"""Parameter inventory of a pipeline stage: the parameter shards of a model, as input to the cost formulas.

During a run, the inventory describes the model that is trained. Before a run, it describes the model registered as
``model_type``, built on the meta device with the sharding of the parallel layout. This build allocates no memory, needs
no process group, and takes only as long as creating the modules of one stage, whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from internlm.accelerator import HOST
from internlm.config import Config, config_hash
from internlm.config.schema import ModelConfig
from internlm.core.context.parallel_context import sizes_of
from internlm.core.parallel import ParallelLinear
from internlm.core.parallel.blocks import containing_block, declared_blocks
from internlm.core.parallel.layers import widen_norms
from internlm.core.parallel.param_state import compute_dtype, placed_parameters
from internlm.core.parallel.sharding import GroupPosition, Sharding, building
from internlm.costs import NoCostFormulaError, ParamInventory, ParamShard, Plan, memory_plan
from internlm.costs.stages import stage_layers_of
from internlm.model.decoder import Decoder
from internlm.model.registry import model_initializer, register_model_initializer
from internlm.utils.dtype import default_dtype, torch_dtype
from internlm.utils.errors import ConfigError, Problem, known_names

#: Inventories by config hash, world size, stage and registered function. ``verify`` needs the same few in each step of
#: each rank, and the log needs that of each stage.
_CACHE: dict[tuple[str, int, int, Callable[..., nn.Module]], ParamInventory] = {}
_CACHE_SIZE = 256


def build_inventory(config: Config, world_size: int, stage: int = 0) -> ParamInventory:
    """Build the registered model on the meta device, and list the parameters that a rank of ``stage`` holds.

    Args:
        config: Resolved config.
        world_size: Number of ranks of the run.
        stage: Index of the pipeline stage.

    Raises:
        NoCostFormulaError: ``config.model_type`` is not registered, or the model cannot be built on the meta device.
        ConfigError: The sizes of the model are too large for any tensor.
    """
    register_model_initializer()
    name = config.model_type
    if name not in model_initializer:
        raise NoCostFormulaError(name, "which is not registered", known_names(model_initializer))
    key = config_hash(config), world_size, stage, model_initializer.get_module(name)
    if key not in _CACHE:
        # Drop all entries: most runs need only a few, and building an inventory again is cheap.
        if len(_CACHE) >= _CACHE_SIZE:
            _CACHE.clear()
        _CACHE[key] = inventory_of(_build_on_meta(config, world_size, stage), config, world_size, stage)
    return _CACHE[key]


def _build_on_meta(config: Config, world_size: int, stage: int) -> nn.Module:
    assert config.model.dtype is not None, "the resolver fills model.dtype"
    sizes, dtype = sizes_of(config, world_size), torch_dtype(config.model.dtype)
    # Padding gives all ranks of a group shards of the same shape, so the shards of rank 0 represent them all.
    sharding = Sharding(config.parallel.tensor.mode, GroupPosition(0, sizes.tensor), GroupPosition(0, sizes.weight))
    build = model_initializer.get_module(config.model_type)
    # A model may draw its own initial values. Forking keeps the generators of the run independent of this build.
    with torch.random.fork_rng(devices=[]), default_dtype(dtype), torch.device("meta"):
        try:
            with building(sharding, stage_layers_of(config, stage)):
                model: nn.Module = build(config.model)
        except Exception as error:  # any, such as that of a user's function that reads values, which meta tensors lack
            _check_sizes(config.model, error)
            reason = f"which cannot be built on the meta device: {error!r}"
            raise NoCostFormulaError(config.model_type, reason) from error
    if not isinstance(model, nn.Module):
        reason = f"whose function returned {type(model).__name__}, which is no module"
        raise NoCostFormulaError(config.model_type, reason, "Return an nn.Module.")
    if config.use_fp32_norm:
        widen_norms(model)
    return model


def _check_sizes(model: ModelConfig, error: Exception) -> None:
    """Raise :class:`ConfigError` if ``error`` is torch's for a size, or a number of bytes, of more than 64 bits."""
    if "overflow" not in str(error).lower():
        return
    names = ("hidden_size", "vocab_size", "mlp_ratio", "num_attention_heads", "head_dim")
    value, name = max((getattr(model, name) or 0, name) for name in names)
    message = f"{value} makes a parameter with more bytes than a 64-bit integer can count"
    raise ConfigError(Problem(f"model.{name}", message, "Use a smaller model")) from None


def inventory_of(model: nn.Module, config: Config, world_size: int, stage: int) -> ParamInventory:
    """List the parameters of ``model``, which may be on the meta device.

    Args:
        model: Model of pipeline stage ``stage``, with a placement for each parameter.
        config: Resolved config.
        world_size: Number of ranks of the run.
        stage: Index of the pipeline stage.
    """
    blocks = declared_blocks(model)
    # fully_shard splits linear weights as matrices, because the first axis of a fused weight may be too short to split.
    of_linears = {
        parameter
        for module in model.modules()
        if isinstance(module, ParallelLinear)
        for parameter in module.parameters(recurse=False)
    }
    shards = []
    for name, parameter, placement in placed_parameters(model):
        shape, block = placement.local_shape, containing_block(name.rpartition(".")[0], blocks)
        width = math.prod(shape[1:])
        if parameter in of_linears:
            width = shape[-1] if placement.is_matrix else 1
        shard = ParamShard(
            name=name,
            placement=placement,
            dtype=compute_dtype(parameter),
            rows=math.prod(shape) // width,
            width=width,
            block=block if block in blocks else "",
            trainable=parameter.requires_grad,
        )
        shards.append(shard)
    spec = model.spec if isinstance(model, Decoder) and model.spec.config == config.model else None
    return ParamInventory(config=config, world_size=world_size, stage=stage, shards=tuple(shards), spec=spec)


def plans_of_stages(config: Config, world_size: int, device_type: str = HOST.type) -> list[Plan]:
    """Return one memory plan per pipeline stage, computed for the stage's rank that needs the most memory.

    Raises:
        NoCostFormulaError: ``config.model_type`` is not registered, or the model cannot be built on the meta device.
    """
    stages = range(config.parallel.pipeline.size)
    return [memory_plan(build_inventory(config, world_size, stage), device_type=device_type) for stage in stages]
