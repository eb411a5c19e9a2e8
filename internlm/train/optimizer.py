"""Optimizer assembly."""

from __future__ import annotations

from torch import nn

from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.weight_gatherer import WeightGatherer
from internlm.solver.optimizer import Groups, HybridZeroOptimizer, LossScale
from internlm.solver.schedulers import Beta2Schedule, LRSchedule
from internlm.utils.dtype import torch_dtype


def initialize_optimizer(
    model: nn.Module, isp_communicator: WeightGatherer | None = None
) -> tuple[HybridZeroOptimizer, Beta2Schedule, LRSchedule]:
    """The optimizer over ``model``, and the schedules of beta2 and of the learning rate, as the global config
    describes them.

    From here on the parameters of ``model`` are views of the optimizer's flat buffers, unless they are fully sharded.
    """
    config = gpc.config
    optimizer = HybridZeroOptimizer(
        model,
        config.adam,
        config.hybrid_zero_optimizer,
        _groups(config),
        optimizer=config.optimizer,
        loss_scale=_loss_scale(config),
        reduce_dtype=torch_dtype(config.reduce_comm_dtype) if config.reduce_comm_dtype else None,
    )
    beta2 = Beta2Schedule.from_config(config.beta2_scheduler, config.adam)
    return optimizer, beta2, LRSchedule.from_config(config.lr_scheduler, config.adam)


def _groups(config: Config) -> Groups:
    isp = config.parallel.tensor.mode == "isp"
    return Groups(
        zero=gpc.group(ParallelMode.ZERO1),
        replica=gpc.group(ParallelMode.ZERO1_REPLICA),
        split=(gpc.group(ParallelMode.WEIGHT if isp else ParallelMode.TENSOR),),
        pipeline=gpc.group(ParallelMode.PIPELINE),
        ends=gpc.pipeline_ends(),
    )


def _loss_scale(config: Config) -> LossScale:
    """Only float16 needs one."""
    return LossScale.dynamic(config.grad_scaler) if config.model.dtype == "torch.float16" else LossScale()
