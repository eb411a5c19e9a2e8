"""Train a few steps on one rank, as a user's script would, and record them for a comparison."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from internlm.config import Config
from internlm.config.load import execute_file
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.ledger import LEDGER, Traffic, sum_traffic
from internlm.core.parallel.param_state import accumulated_grad, compute_dtype, placed_parameters
from internlm.core.scheduler.actions import FORWARD
from internlm.core.scheduler.loss import WEIGHTED
from internlm.core.trainer import StepReport, Trainer
from internlm.data.loader import Batch, TrainLoader
from internlm.initialize.build_trainer import initialize_trainer
from internlm.initialize.launch import initialize_distributed_env
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.train.build_data import build_train_loader_with_data_type
from internlm.train.build_model import create_model
from internlm.train.build_optimizer import initialize_optimizer
from internlm.train.parallelize import initialize_model_and_parallel_communicator
from internlm.verify.record import Details, RankCoordinates, RankRecord, ShardsByName, add_shards, host_copy
from internlm.verify.watch import watching

#: Parallel modes of the fields of :class:`RankCoordinates`, in their order.
COORDINATES = ParallelMode.DATA, ParallelMode.TENSOR, ParallelMode.PIPELINE, ParallelMode.ZERO1


def run_file(rank: int, world_size: int, path: str, *run: Any) -> RankRecord:
    """Call :func:`run_rank` after executing the config file, which may import and so register a user's own model."""
    # A search runs dozens of times: what a training run logs would hide the report.
    logging.disable(logging.INFO)
    execute_file(path)
    return run_rank(rank, world_size, *run)


def run_rank(
    rank: int,
    world_size: int,
    config: Config | Mapping[str, Any],
    seed: int,
    steps: int,
    parts: int = 1,
    details_of: int | None = None,
) -> RankRecord:
    """Train ``steps`` steps of ``config`` on this rank, without saving, logging or validating anything.

    Args:
        rank: Unused; read from the environment, as set by torchrun.
        world_size: Number of ranks.
        config: Resolved config, or a dict of config keys.
        seed: Seed of parameters and data.
        steps: Number of steps to train.
        parts: Number of equal parts into which the micro-batches of the first step are split; module outputs are
            recorded in the first micro-batch of each part. For the one-process reference, pass the number of
            data-parallel ranks, so that each part contains the micro-batches of one of these ranks.
        details_of: Index of a step to record instead of the first, in every micro-batch and with all that the search
            for a culprit needs; None: none.
    """
    initialize_distributed_env(config if isinstance(config, Config) else dict(config), seed=seed)
    model, communicator = initialize_model_and_parallel_communicator(create_model(deferred=True))
    loader, types = build_train_loader_with_data_type()
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(types))
    trainer.train()
    meter = _Meter(trainer, loader)
    recorded = details_of or 0
    reports = [meter.step() for _ in range(recorded)]
    if reports:
        meter.finish()  # the parameters are read now
    details = None if details_of is None else _details(model, details_of)
    micro_num = loader.plan.micro_batches(recorded)
    watched, calls = range(0, micro_num, 1 if details else micro_num // parts), _forward_calls(trainer, micro_num)
    before_pass = partial(_add_accumulated, model, details) if details and world_size == 1 else lambda: None
    with watching(model, watched, calls, details, before_pass) as passes:
        reports.append(meter.step())
    # Before the next step, which overwrites the buffers.
    gradients = _gradients(optimizer, _clipped_by(reports[-1], optimizer.config.clip_grad_norm))
    reports += [meter.step() for _ in range(steps - len(reports))]
    meter.finish()
    return RankRecord(
        coordinates=RankCoordinates(*map(gpc.get_local_rank, COORDINATES)),
        losses=[report.result.loss for report in reports],
        sums=reports[recorded].result.sums[:WEIGHTED].tolist(),  # the losses are compared themselves
        norms=[report.update.grad_norm for report in reports],
        gradients=gradients,
        parameters=_parameters(model),
        passes=passes,
        traffic=meter.traffic,
        tokens=meter.tokens,
        types=len(types),
        peak_in_flight=trainer.scheduler.peak_in_flight,
        details=details,
    )


def _details(model: nn.Module, step: int) -> Details:
    return Details(step=step, initial=_parameters(model), order=[name for name, _, _ in placed_parameters(model)])


def _add_accumulated(model: nn.Module, details: Details) -> None:
    """Add a copy of the gradients that have been accumulated so far."""
    gradients = ((name, accumulated_grad(parameter)) for name, parameter, _ in placed_parameters(model))
    details.accumulated.append({name: host_copy(grad) for name, grad in gradients if grad is not None})


def _forward_calls(trainer: Trainer, micro_num: int) -> list[int]:
    """Return the micro-batch of each forward call of the model in a step of ``micro_num`` micro-batches."""
    actions = trainer.scheduler.table(micro_num).actions[gpc.get_local_rank(ParallelMode.PIPELINE)]
    return [action.micro_batch for action in actions if action.type == FORWARD]


class _Meter:
    """Trainer wrapper that records the tokens and the traffic of each step."""

    def __init__(self, trainer: Trainer, loader: TrainLoader) -> None:
        self.trainer, self.traffic, self.tokens = trainer, list[Traffic](), list[list[int]]()
        self._batches = self._recorded(iter(loader))

    def step(self) -> StepReport:
        # Building the model and the optimizer communicates too, which the formula of a step does not include.
        before = LEDGER.snapshot()
        report = self.trainer.train_step(self._batches)
        self.traffic.append(LEDGER.since(before))
        return report

    def finish(self) -> None:
        """Finish the communication that the last step deferred (``overlap_sync_param``) and count it in that step."""
        before = LEDGER.snapshot()
        self.trainer.optimizer.gather_parameters()
        self.traffic[-1] = sum_traffic([self.traffic[-1], LEDGER.since(before)])

    def _recorded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch, labels in batches:
            self.tokens.append([int((row != -100).sum()) for row in labels])
            yield batch, labels


def _clipped_by(report: StepReport, clip_grad_norm: float) -> float:
    """Return the divisor that clipping applied to the gradients in the buffers of ``HybridZeroOptimizer``."""
    # The optimizer scales the buffers in place by min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_ does.
    # Comparing clipped gradients would hide an error common to all of them, and spread an error of the norm to all.
    clips = report.update.updated and clip_grad_norm > 0
    return max(1.0, (report.update.grad_norm + 1e-6) / clip_grad_norm) if clips else 1.0


def _gradients(optimizer: HybridZeroOptimizer, clipped_by: float) -> ShardsByName:
    """Return this rank's shards of the reduced gradients."""
    gradients: ShardsByName = {}
    for group in optimizer.groups:
        for part in group.shard_slices():
            flat = group.grad_shards[part.index] * clipped_by
            slices = part.placement.slices(part.start, part.stop)
            add_shards(gradients, part.name, part.placement.global_shape, slices, flat, part.lo - part.start)
    return gradients


def _parameters(model: nn.Module) -> ShardsByName:
    """Return this rank's shards of the parameters, in their compute dtype."""
    parameters: ShardsByName = {}
    for name, parameter, placement in placed_parameters(model):
        flat, start = local_shard(parameter)
        slices = placement.slices(start, start + len(flat))
        add_shards(parameters, name, placement.global_shape, slices, flat.to(compute_dtype(parameter)), -start)
    return parameters
