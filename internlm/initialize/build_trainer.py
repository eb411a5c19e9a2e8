"""The trainer from its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from internlm import accelerator
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.dropout import DropoutKey
from internlm.core.scheduler import NonPipelineScheduler, Scheduler, TokenCrossEntropy
from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.schedulers import SCHEDULERS, Pipeline
from internlm.core.scheduler.table import schedule_of
from internlm.core.trainer import Trainer
from internlm.costs.stages import own_table
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.errors import ConfigError, Problem


def initialize_trainer(
    model: nn.Module,
    optimizer: HybridZeroOptimizer,
    lr_scheduler: Callable[[int], float],
    beta2_scheduler: Callable[[int], float],
    criterion: TokenCrossEntropy | None = None,
    types: int = 1,
) -> Trainer:
    """A :class:`Trainer` over a model and what :func:`initialize_optimizer` made for it.

    ``criterion`` defaults to cross-entropy with the config's label smoothing; ``types`` is the number of data-set
    types.
    """
    criterion = criterion or TokenCrossEntropy(model, gpc.config.loss.label_smoothing)
    return Trainer(model, optimizer, _scheduler(criterion, types), lr_scheduler, beta2_scheduler)


def _scheduler(criterion: TokenCrossEntropy, types: int) -> Scheduler:
    tokens = ParallelMode.ISP_DATA if gpc.config.parallel.tensor.mode == "isp" else ParallelMode.DATA
    options = criterion, types, gpc.group(tokens), accelerator.current_device()
    config, chunks = gpc.config.parallel.pipeline, gpc.config.model.num_chunks
    dropout_key = DropoutKey(
        seed=gpc.seed,
        data_rank=gpc.get_local_rank(ParallelMode.DATA),
        tensor_rank=gpc.get_local_rank(ParallelMode.TENSOR),
    )
    if config.size * chunks == 1:
        return NonPipelineScheduler(*options, dropout_key=dropout_key)
    kind = schedule_of(config.mode, chunks)
    pipeline = Pipeline(
        gpc.group(ParallelMode.PIPELINE),
        chunks,
        _channels(kind) if config.size > 1 else None,
        own_table(gpc.config),
    )
    scheduler = SCHEDULERS[kind](*options, pipeline, dropout_key)
    _check_agreement(scheduler.table(gpc.config.data.micro_num))  # what is wrong with it is said before the run
    return scheduler


def _check_agreement(table: Table) -> None:
    """Ranks that run other tables would wait for one another; a file may be another one on another machine."""
    tables: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(tables, hashlib.sha256(repr(table.actions).encode()).hexdigest()[:12])
    if len(set(tables)) > 1:
        shown = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(tables))
        raise ConfigError(
            Problem(table.schedule, f"is not the same file on all ranks ({shown})", "Copy it to all machines")
        )


def _channels(kind: str) -> Channels:
    """To and from this rank's neighbours: those before and after it in the chain of stages; for chunks that begin
    anew, the last is before the first."""
    stage, config = gpc.group(ParallelMode.PIPELINE), gpc.config.parallel
    incoming, outgoing = {}, {}
    for number, pairs in enumerate(_neighbours(stage.size, ring=kind == "interleaved")):
        up, down = (gpc.pair_of_stages(f"{number} {direction}", pairs) for direction in ("up", "down"))
        for lower, upper in pairs:
            if stage.rank == lower:
                outgoing[upper], incoming[upper] = up, down
            if stage.rank == upper:
                outgoing[lower], incoming[lower] = down, up
    overlap = kind != "interleaved" or config.pipeline.interleaved_overlap
    return Channels(stage, incoming, outgoing, accelerator.current_device(), config.timeout, overlap)


def _neighbours(stages: int, ring: bool) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours, in lists in which no stage is twice."""
    lists = [[(rank, rank + 1) for rank in range(first, stages - 1, 2)] for first in (0, 1)]
    lists.append([(stages - 1, 0)] if ring and stages > 2 else [])
    return [pairs for pairs in lists if pairs]
