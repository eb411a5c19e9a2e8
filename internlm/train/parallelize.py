"""The recipe: how a model becomes the parallel one that is trained, read from top to bottom."""

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
from internlm.core.parallel.param_state import placed_parameters, placement_of, state_buffers
from internlm.core.parallel.weight_gatherer import LAUNCH_POSITIONS, Overlap, WeightGatherer
from internlm.train.build_model import check_stage, create_model
from internlm.utils.dtype import torch_dtype, wide


def initialize_model_and_parallel_communicator(
    model: nn.Module | None = None,
) -> tuple[nn.Module, WeightGatherer | None]:
    """Make ``model`` ready for parallel training, as the global config describes it.

    Args:
        model: default: :func:`create_model`. A model of your own keeps the values that it has, those of rank 0.

    Returns:
        The model, and, under isp with split weights, its communicator, which :func:`initialize_optimizer` takes.
    """
    # 1. Build. Parameters of parallel layers know their shard, and need no memory until it is final.
    model = create_model() if model is None else model
    check_stage(model, type(model).__name__)
    # A user's own values become equal while they are whole, before anything shards them.
    synchronize_parameters(model, [parameter for parameter in model.parameters() if not parameter.is_meta])
    synchronize_buffers(model)

    # 2. Communicators belong to layers, so they come before anything that replaces what a block does.
    gatherer = attach(model)

    # 3. Recompute and offloading go around the block's own computation ...
    checkpoint_and_offload(model)

    # 4. ... and compiling into it: a graph is then that of one block, called again when the block is recomputed.
    compile_blocks(model)

    # 5. fully_shard hooks the modules, so what steps 3 and 4 made of a forward runs on gathered parameters.
    shard(model)

    # 6. Only now it is final which elements this rank holds: it allocates and draws these, and no others.
    synchronize_parameters(model, materialize(model, gpc.seed, accelerator.current_device()))
    return model, gatherer


def initialize_model(model: nn.Module | None = None) -> nn.Module:
    """Do all of :func:`initialize_model_and_parallel_communicator` but communication: steps 1, 3, 4 and 6."""
    model = create_model() if model is None else model
    check_stage(model, type(model).__name__)
    checkpoint_and_offload(model)
    compile_blocks(model)
    materialize(model, gpc.seed, accelerator.current_device())
    synchronize_parameters(model, list(model.parameters()))
    synchronize_buffers(model)
    return model


def initialize_parallel_communicator(model: nn.Module) -> WeightGatherer | None:
    """Attach communicators, and shard parameters fully under ``parallel.zero1.fsdp``: steps 2 and 5.

    With data parallelism alone every layer is whole and keeps the identity communicator that it was built with.

    Returns:
        The communicator of isp where weights are split, else None.
    """
    gatherer = attach(model)
    shard(model)
    return gatherer


def attach(model: nn.Module) -> WeightGatherer | None:
    """Attach the communicators of the parallel mode to the layers of ``model``."""
    weight = gpc.config.parallel.weight
    overlap = Overlap(
        enabled=weight.overlap,
        per_layer=weight.forward_overlap_per == "layer",
        launch_position=LAUNCH_POSITIONS[weight.launch_allgather_before],
        memory_pool=weight.memory_pool,
    )
    groups = gpc.group(ParallelMode.TENSOR), gpc.group(ParallelMode.WEIGHT)
    return attach_communicators(model, gpc.config.parallel.tensor.mode, *groups, overlap)


def checkpoint_and_offload(model: nn.Module) -> None:
    """Apply ``model.checkpoint`` and ``model.cpu_offloading`` around the blocks of ``model``."""
    config = gpc.config.model
    checkpoint_and_offload_blocks(model, config.recomputes, config.cpu_offloading)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of ``model`` under ``model.compile``."""
    if gpc.config.model.compile:
        from internlm.train import compile as compiling  # takes seconds to import: it loads the compiler

        compiling.compile_blocks(model)


def shard(model: nn.Module) -> None:
    """Shard the parameters of ``model`` over the zero group under ``parallel.zero1.fsdp``."""
    config, zero = gpc.config, gpc.group(ParallelMode.ZERO1)
    if not config.parallel.zero1.fsdp or zero.size == 1:
        return
    dtype, reduce_dtype = torch_dtype(str(config.model.dtype)), config.reduce_comm_dtype
    grad_dtype = wide(dtype) if config.hybrid_zero_optimizer.fp32_grad_accum else dtype
    shard_fully(model, zero, dtype, grad_dtype, torch_dtype(reduce_dtype) if reduce_dtype else None)


def synchronize_parameters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Broadcast these parameters of ``model`` to all ranks that hold copies of them.

    Values that were drawn are equal already on processors of one type, but may differ in the last bit across types.
    """
    gpc.pipeline_ends()  # all ranks must create this group, and only some use it
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
    if isinstance(parameter, DTensor):
        yield gpc.group(ParallelMode.ZERO1_REPLICA)
    else:
        yield gpc.group(ParallelMode.WEIGHT_DATA if isp else ParallelMode.DATA)
    if placement.partial_over is ParallelMode.PIPELINE:
        yield gpc.pipeline_ends()
