"""Model assembly, a recipe in a fixed order: build → initialise → compile → communicators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from internlm import accelerator
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.group import Group
from internlm.core.context.random import derived_seed
from internlm.core.parallel import ParallelNorm
from internlm.core.parallel.attach import attach_communicators
from internlm.core.parallel.collectives import broadcast
from internlm.core.parallel.fully_sharded import shard_fully
from internlm.core.parallel.initial_values import initialize_parameters
from internlm.core.parallel.param_state import placed_parameters, state_buffers
from internlm.core.parallel.placement import ParamPlacement
from internlm.core.parallel.sharding import GroupPosition, Sharding, StageLayers, building
from internlm.core.parallel.weight_gatherer import LAUNCH_PLACES, Overlap, WeightGatherer
from internlm.costs.stages import stage_layers_of
from internlm.model.decoder import Decoder
from internlm.model.registry import model_initializer, register_model_initializer
from internlm.ops import why_unavailable
from internlm.utils.dtype import default_dtype, torch_dtype, wide
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.logger import get_logger


def create_model(model_type: str | None = None) -> nn.Module:
    """The model of the global config (or of another registered ``model_type``), its parameters drawn from the run's
    seed."""

    def share(mode: ParallelMode) -> GroupPosition:
        return GroupPosition(gpc.get_local_rank(mode), gpc.get_world_size(mode))

    sharding = Sharding(gpc.config.parallel.tensor.mode, share(ParallelMode.TENSOR), share(ParallelMode.WEIGHT))
    name = model_type or gpc.config.model_type
    model = build_model(gpc.config, gpc.seed, name, sharding, _own_part())
    _check_part(model, name)
    _doubt_keys_of_the_decoder(model, name)
    return model


def build_model(
    config: Config,
    seed: int,
    model_type: str | None = None,
    sharding: Sharding | None = None,
    stage_layers: StageLayers | None = None,
) -> nn.Module:
    """The model that ``config`` describes, or this rank's part of it by ``sharding`` and ``part``, on this process's
    device, its parameters drawn from ``seed``."""
    register_model_initializer()
    build = model_initializer.get_module(model_type or config.model_type)
    assert config.model.dtype is not None, "the resolver fills model.dtype"
    dtype = torch_dtype(config.model.dtype)
    _check_attention(config.model.attention_backend, dtype)
    if config.model.dtype == "torch.tf32":
        torch.set_float32_matmul_precision("high")
    device = accelerator.current_device()
    randomness = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with randomness, default_dtype(dtype), device, building(sharding or Sharding(), stage_layers):
        torch.manual_seed(derived_seed(seed, "model"))  # for models that draw their own values
        model: nn.Module = build(config.model)
    if config.use_fp32_norm:
        widen_norms(model)
    initialize_parameters(model, seed)
    return model


def widen_norms(model: nn.Module) -> None:
    """Have the weights of norms in float32 at least, whatever the type of the rest."""
    for module in model.modules():
        if isinstance(module, ParallelNorm):
            module.to(wide(module.weight.dtype))


def _check_part(model: nn.Module, name: str) -> None:
    """A model of which this rank should have a part, or chunks, must have asked for it."""
    stage_layers = _own_part()
    if (len(stage_layers.chunks) > 1 or not stage_layers.is_whole) and getattr(
        model, "stage_layers", None
    ) != stage_layers:
        what = f"{name!r} can't be split into stages: it did not ask for its part"
        todo = "Build it by internlm.core.parallel.current_part, or set parallel.pipeline.size and model.num_chunks "
        raise ConfigError(Problem("model_type", what, f"{todo}to 1"))


def _doubt_keys_of_the_decoder(model: nn.Module, name: str) -> None:
    """What our decoder does when it runs, a model of a user's own must do itself."""
    given = [f"model.{key}" for key in ("checkpoint", "cpu_offloading", "drop_rate") if getattr(gpc.config.model, key)]
    if given and not isinstance(model, Decoder) and gpc.get_global_rank() == 0:
        get_logger().warning(f"{', '.join(given)}: without effect, unless {name!r} sees to it itself")


def _own_part() -> StageLayers:
    return stage_layers_of(gpc.config, gpc.get_local_rank(ParallelMode.PIPELINE))


def _check_attention(backend: str, dtype: torch.dtype) -> None:
    reason = "" if backend == "auto" else why_unavailable(backend, accelerator.device_type(), dtype)
    if reason:
        raise ConfigError(Problem("model.attention_backend", f"'{backend}' can't be used: {reason}", "Use 'auto'"))


def initialize_model(model: nn.Module | None = None) -> nn.Module:
    """A model ready for training: ``model`` (default: :func:`create_model`), each of its parameters placed, and equal
    on all ranks that hold copies of it, however it was made."""
    model = create_model() if model is None else model
    _check_part(model, type(model).__name__)
    gpc.pipeline_ends()  # which all ranks must ask for, and here some will
    for _, parameter, placement in placed_parameters(model):
        for group in _copies(placement):
            broadcast(parameter.detach(), group)
    for _, buffer in state_buffers(model):
        broadcast(buffer, gpc.group(ParallelMode.ISP_DATA))  # all ranks of a stage
    if gpc.config.model.compile:
        from internlm.train.compile import compile_blocks  # which loads the compiler

        compile_blocks(model)
    return model


def _copies(placement: ParamPlacement) -> Iterator[Group]:
    """The groups over which a parameter that lies so is copied."""
    split, data = (
        (ParallelMode.WEIGHT, ParallelMode.WEIGHT_DATA) if _isp() else (ParallelMode.TENSOR, ParallelMode.DATA)
    )
    if not placement.shard:
        yield gpc.group(split)
    yield gpc.group(data)
    if placement.partial_over is ParallelMode.PIPELINE:
        yield gpc.pipeline_ends()


def _isp() -> bool:
    return gpc.config.parallel.tensor.mode == "isp"


def initialize_parallel_communicator(model: nn.Module) -> WeightGatherer | None:
    """Attach the communicators of the parallel mode to the layers of ``model``; that of isp is returned, if isp is on.
    Under ``parallel.zero1.fsdp`` its parameters are shared from here on.

    With data parallelism alone every layer is whole and stays with the silent communicator that it was built with.
    """
    weight = gpc.config.parallel.weight
    overlap = Overlap(
        enabled=weight.overlap,
        per_layer=weight.forward_overlap_per == "layer",
        launch_place=LAUNCH_PLACES[weight.launch_allgather_before],
        memory_pool=weight.memory_pool,
    )
    groups = gpc.group(ParallelMode.TENSOR), gpc.group(ParallelMode.WEIGHT)
    gatherer = attach_communicators(model, gpc.config.parallel.tensor.mode, *groups, overlap)
    if gpc.config.parallel.zero1.fsdp:
        _shard_fully(model)
    return gatherer


def _shard_fully(model: nn.Module) -> None:
    config, zero = gpc.config, gpc.group(ParallelMode.ZERO1)
    dtype, reduced = torch_dtype(str(config.model.dtype)), config.reduce_comm_dtype
    grad_dtype = wide(dtype) if config.hybrid_zero_optimizer.fp32_grad_accum else dtype
    if zero.size > 1:
        shard_fully(model, zero, dtype, grad_dtype, torch_dtype(reduced) if reduced else None)


def initialize_model_and_parallel_communicator(
    model: nn.Module | None = None,
) -> tuple[nn.Module, WeightGatherer | None]:
    """:func:`initialize_model`, then :func:`initialize_parallel_communicator`; both results."""
    model = initialize_model(model)
    return model, initialize_parallel_communicator(model)
