"""Build the optimizer and the schedules of its hyperparameters from the global config."""

from __future__ import annotations

import re

import torch
from torch import nn

from internlm.accelerator import device_kind, to_device, to_host
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.collectives import all_reduce
from internlm.core.parallel.param_state import placed_parameters
from internlm.core.parallel.weight_gatherer import WeightGatherer
from internlm.solver.lr_schedules import Beta2Schedule, LRSchedule
from internlm.solver.optimizer import HybridZeroOptimizer, LossScale, ProcessGroups
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import ConfigError, Problem


def initialize_optimizer(
    model: nn.Module, isp_communicator: WeightGatherer | None = None
) -> tuple[HybridZeroOptimizer, Beta2Schedule, LRSchedule]:
    """Build the optimizer of ``model``, and the beta2 and learning-rate schedules, from the global config.

    The parameters of ``model`` become views of the optimizer's flat buffers, unless they are fully sharded.

    Args:
        model: Initialised model with attached communicators.
        isp_communicator: Ignored, because layers hold their communicators; existing InternEvo scripts pass it.

    Returns:
        The optimizer, the beta2 schedule and the learning-rate schedule.

    Raises:
        ConfigError: A pattern of ``optimizer.param_groups`` matches no parameter of any pipeline stage, or assigns
            Muon to a parameter that is not a matrix.
        UserError: A parameter has no placement, or no parameter is trainable.
    """
    config = gpc.config
    _refuse_patterns_without_parameters(model, [group.pattern for group in config.optimizer.param_groups])
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


def _refuse_patterns_without_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Raise if a pattern of ``optimizer.param_groups`` matches no parameter of any pipeline stage."""
    if not patterns or not device_kind().has_values:
        return
    names = [name for name, *_ in placed_parameters(model)]
    # Summed over stages, because a pattern may match parameters of another stage only.
    matches = torch.tensor([sum(bool(re.search(pattern, name)) for name in names) for pattern in patterns])
    total = all_reduce(to_device(matches, next(model.parameters()).device), gpc.group(ParallelMode.PIPELINE))
    counts = to_host(total, "parameters of optimizer.param_groups").tolist()
    problems = [
        Problem(
            "optimizer.param_groups",
            f"pattern {pattern!r} matches no parameter",
            f"Correct it to match names such as {names[0]!r}",
        )
        for pattern, count in zip(patterns, counts, strict=True)
        if not count
    ]
    if problems:
        raise ConfigError(*problems)


def _groups(config: Config) -> ProcessGroups:
    # Only isp has a separate group for weights; the other modes split weights over the tensor group.
    isp = config.parallel.tensor.mode == "isp"
    return ProcessGroups(
        zero=gpc.group(ParallelMode.ZERO1),
        replica=gpc.group(ParallelMode.ZERO1_REPLICA),
        split=(gpc.group(ParallelMode.WEIGHT if isp else ParallelMode.TENSOR),),
        pipeline=gpc.group(ParallelMode.PIPELINE),
        ends=gpc.pipeline_ends(),
    )


def _loss_scale(config: Config) -> LossScale:
    """Return a dynamic loss scale for float16, in which small gradients underflow; otherwise a constant 1."""
    return LossScale(config.grad_scaler) if config.model.dtype == "torch.float16" else LossScale()
