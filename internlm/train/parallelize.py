"""Parallelisation of a model, in six numbered steps from building it to materialising its shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.distributed.tensor import DTensor

from internlm import accelerator
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.group import Group
from internlm.core.parallel.attach import attach_communicators
from internlm.core.parallel.block_forward import checkpoint_and_offload_blocks
from internlm.core.parallel.collectives import broadcast
from internlm.core.parallel.fully_sharded import local_shard, shard_fully
from internlm.core.parallel.initialization import materialize
from internlm.core.parallel.lora import is_adapter
from internlm.core.parallel.param_state import placed_parameters, placement_of, state_buffers
from internlm.core.parallel.weight_gatherer import LAUNCH_POSITIONS, Overlap, WeightGatherer
from internlm.model.decoder import Decoder
from internlm.train.build_model import check_stage, create_model
from internlm.utils.compat import naming_current_call
from internlm.utils.dtype import torch_dtype, wide
from internlm.utils.errors import Problem, UserError


def initialize_model_and_parallel_communicator(
    model: nn.Module | None = None, *, loads_all: bool = False
) -> tuple[nn.Module, WeightGatherer | None]:
    """Prepare ``model`` for parallel training with the global config.

    Parameters that several ranks hold are broadcast from the first of these ranks.

    Args:
        model: Model to prepare; default: the model that :func:`create_model` builds.
        loads_all: Whether the caller loads all parameters but adapters afterwards. If so, those on the meta device get
            memory without initial values, which take long to draw.

    Returns:
        The prepared model, and its weight gatherer for :func:`initialize_optimizer`: None unless isp splits weights.

    Raises:
        ConfigError: The model was not built for this rank's pipeline stage, or has no blocks to compile.
    """
    # 1. Build. Under fsdp, the parameters of parallel layers have a placement but no memory until step 6.
    model = create_model(deferred=True) if model is None else model
    _check_is_module(model)
    check_stage(model, type(model).__name__)
    # Broadcast the values of allocated parameters while these are whole, before step 5 shards them.
    synchronize_parameters(model, [parameter for parameter in model.parameters() if not parameter.is_meta])
    synchronize_buffers(model)

    # 2. Communicators belong to layers, so they are attached before steps that replace the forward of a block.
    gatherer = attach(model)

    # 3. Recompute and offloading wrap the block's own computation ...
    checkpoint_and_offload(model)

    # 4. ... and compiling replaces it: a graph covers one block, and is called again when the block is recomputed.
    compile_blocks(model)

    # 5. fully_shard hooks the modules, so the forward from steps 3 and 4 runs on gathered parameters.
    shard(model)

    # 6. Now the shards are final: allocate and initialise only the elements that this rank holds.
    device = accelerator.current_device()
    if loads_all:
        materialize(model, gpc.seed, device, draws=is_adapter)
    else:
        synchronize_parameters(model, materialize(model, gpc.seed, device))
    return model, gatherer


@naming_current_call("initialize_model(model)")
def initialize_model(model: nn.Module | None = None) -> nn.Module:
    """Prepare ``model`` for training, without communicators and sharding.

    These are steps 1, 3, 4 and 6 of :func:`initialize_model_and_parallel_communicator`: build, recompute and
    offloading, compile, materialise.

    Args:
        model: Model to prepare; default: the model that :func:`create_model` builds.

    Returns:
        The prepared model.

    Raises:
        ConfigError: The model was not built for this rank's pipeline stage, or has no blocks to compile.
    """
    model = create_model() if model is None else model
    _check_is_module(model)
    check_stage(model, type(model).__name__)
    checkpoint_and_offload(model)
    compile_blocks(model)
    materialize(model, gpc.seed, accelerator.current_device())
    synchronize_parameters(model, list(model.parameters()))
    synchronize_buffers(model)
    return model


def _check_is_module(model: object) -> None:
    if not isinstance(model, nn.Module):  # in older versions, a list of chunks
        message = f"expected one nn.Module, got {type(model).__name__}"
        raise UserError(Problem("model", message, "Pass what create_model returns, which has all chunks of its stage"))


def initialize_parallel_communicator(model: nn.Module) -> WeightGatherer | None:
    """Attach communicators to ``model``, and under ``parallel.zero1.fsdp`` shard its parameters.

    These are steps 2 and 5 of :func:`initialize_model_and_parallel_communicator`. With data parallelism alone, no
    layer is split, and each keeps its identity communicator.

    Returns:
        The weight gatherer of isp if it splits weights, otherwise None.
    """
    gatherer = attach(model)
    shard(model)
    return gatherer


def attach(model: nn.Module) -> WeightGatherer | None:
    """Attach the communicators of the parallel mode to the layers of ``model``.

    Returns:
        The weight gatherer of isp if it splits weights, otherwise None.
    """
    weight = gpc.config.parallel.weight
    overlap = Overlap(
        enabled=weight.overlap,
        per_layer=weight.forward_overlap_per == "layer",
        launch_position=LAUNCH_POSITIONS[weight.launch_allgather_before],
        memory_pool=weight.memory_pool,
    )
    groups = gpc.group(ParallelMode.TENSOR), gpc.group(ParallelMode.WEIGHT)
    if isinstance(model, Decoder):
        model.pipeline = gpc.group(ParallelMode.PIPELINE)
    return attach_communicators(model, gpc.config.parallel.tensor.mode, *groups, overlap)


def checkpoint_and_offload(model: nn.Module) -> None:
    """Apply recompute (key ``model.checkpoint``) and offloading (``model.cpu_offloading``) to each block."""
    config = gpc.config.model
    checkpoint_and_offload_blocks(model, config.recomputes, config.cpu_offloading)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of ``model`` if the config key ``model.compile`` is set."""
    if gpc.config.model.compile:
        from internlm.train import compile as compiling  # here, because loading the compiler takes seconds

        compiling.compile_blocks(model)


def shard(model: nn.Module) -> None:
    """Shard the parameters of ``model`` over the zero group if the config key ``parallel.zero1.fsdp`` is set."""
    config, zero = gpc.config, gpc.group(ParallelMode.ZERO1)
    if not config.parallel.zero1.fsdp or zero.size == 1:
        return
    dtype, reduce_dtype = torch_dtype(str(config.model.dtype)), config.reduce_comm_dtype
    grad_dtype = wide(dtype) if config.hybrid_zero_optimizer.fp32_grad_accum else dtype
    shard_fully(model, zero, dtype, grad_dtype, torch_dtype(reduce_dtype) if reduce_dtype else None)


def synchronize_parameters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Broadcast ``parameters`` of ``model`` to all ranks that hold copies of them.

    Ranks on devices of the same type draw equal values, but values may differ in the last bit between device types.
    """
    gpc.pipeline_ends()  # creates the group: all ranks must do so, though only some use it
    wanted = set(parameters)
    for _, parameter, _ in placed_parameters(model):
        if parameter in wanted:
            for group in _copies(parameter):
                broadcast(local_shard(parameter).flat, group)


def synchronize_buffers(model: nn.Module) -> None:
    """Broadcast the buffers of ``model`` to all ranks of a pipeline stage."""
    for _, buffer in state_buffers(model):
        broadcast(buffer, gpc.group(ParallelMode.ISP_DATA))


def _copies(parameter: nn.Parameter) -> Iterator[Group]:
    """Yield the groups whose ranks hold copies of ``parameter``."""
    placement = placement_of(parameter)
    isp = gpc.config.parallel.tensor.mode == "isp"
    if placement.shard is None:
        yield gpc.group(ParallelMode.WEIGHT if isp else ParallelMode.TENSOR)
    # fully_shard splits the parameter within the zero group, so only the replicas of a shard are copies.
    if isinstance(parameter, DTensor):
        yield gpc.group(ParallelMode.ZERO1_REPLICA)
    else:
        yield gpc.group(ParallelMode.WEIGHT_DATA if isp else ParallelMode.DATA)
    if placement.partial_over is ParallelMode.PIPELINE:
        yield gpc.pipeline_ends()
