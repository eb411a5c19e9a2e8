"""Optimizer assembly."""

from __future__ import annotations

from torch import nn

from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.weight_gatherer import WeightGatherer
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.schedulers import Beta2Schedule, CosineWithWarmup


def initialize_optimizer(
    model: nn.Module, isp_communicator: WeightGatherer | None = None
) -> tuple[HybridZeroOptimizer, Beta2Schedule, CosineWithWarmup]:
    """The optimizer over ``model``, and the schedules of beta2 and of the learning rate, as the global config
    describes them.

    From here on the parameters of ``model`` are views of the optimizer's flat buffers.
    """
    config = gpc.config
    optimizer = HybridZeroOptimizer(
        model,
        config.adam,
        config.hybrid_zero_optimizer.clip_grad_norm,
        zero_group=gpc.group(ParallelMode.ZERO1),
        replica_group=gpc.group(ParallelMode.ZERO1_REPLICA),
        pipeline_group=gpc.group(ParallelMode.PIPELINE),
        ends_group=gpc.pipeline_ends(),
        split_groups=[gpc.group(ParallelMode.WEIGHT if config.parallel.tensor.mode == "isp" else ParallelMode.TENSOR)],
    )
    beta2 = Beta2Schedule.from_config(config.beta2_scheduler, config.adam)
    return optimizer, beta2, CosineWithWarmup.from_config(config.lr_scheduler, config.adam)
