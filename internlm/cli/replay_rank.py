"""One rank of ``internlm data replay``: loss and gradient norm of each micro-batch of a step by itself.

In training, the gradients of all micro-batches are added up, so that the log of a step does not show which of them made
the loss or the gradient norm rise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.accelerator import to_host
from internlm.checkpoint.data_position import LocatedStep, StepEvidence
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.model_loading import load_model
from internlm.cli.ckpt_output import print_json, reports_storage_errors, say, table
from internlm.cli.rank import join_ranks
from internlm.cli.step_location import evidence_of, locate
from internlm.config import masked_dict
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.scheduler import TrainingStep
from internlm.core.scheduler.loss import LOSS, TOKENS
from internlm.core.trainer import Trainer
from internlm.data.loader import Batch, TrainLoader
from internlm.data.packing import padding_row
from internlm.initialize.build_trainer import initialize_trainer
from internlm.initialize.launch import leave_at_exit
from internlm.train.build_data import build_train_loader_with_data_type
from internlm.train.build_model import create_model
from internlm.train.build_optimizer import initialize_optimizer
from internlm.train.parallelize import initialize_model_and_parallel_communicator
from internlm.utils.errors import naming_lost_ranks
from internlm.utils.logger import get_logger

log = get_logger()


class _Replayed(NamedTuple):
    """Results of a micro-batch by itself."""

    data_rank: int
    micro_batch: int
    row: int
    tokens: int  # labels other than -100
    loss: float  # mean over these tokens, in nats; NaN if there are none
    grad_norm: float  # of this mean


def replay_rank(arguments: argparse.Namespace) -> None:
    """Replay the step ``arguments.step``; rank 0 prints the results.

    Raises:
        UserError: Something that the user can fix prevents the replay.
    """
    join_ranks(arguments)
    leave_at_exit()
    exchange = Exchange()
    loader, _ = build_train_loader_with_data_type()
    evidence, located = _locate(arguments, loader, exchange)
    with naming_lost_ranks():
        trainer = _build_trainer(evidence, exchange)
        replayed = list(_run(trainer, loader, arguments.step))
    if dist.get_rank() == 0:
        _print(arguments, evidence, located, replayed)


@reports_storage_errors
def _locate(arguments: argparse.Namespace, loader: TrainLoader, exchange: Exchange) -> tuple[StepEvidence, LocatedStep]:
    with exchange.failing_together():
        evidence = evidence_of(gpc.config, arguments.ckpt, arguments.step)
        located = locate(gpc.config, gpc.seed, arguments.step, loader, evidence)
    return evidence, located


def _build_trainer(evidence: StepEvidence, exchange: Exchange) -> Trainer:
    """Build a trainer with the parameters of the checkpoint before the step, or those that the run began with."""
    config = gpc.config
    model, communicator = initialize_model_and_parallel_communicator(create_model(deferred=True))
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule)
    if evidence.before is not None:
        saved = load_model(model, evidence.before.where, masked_dict(config), exchange, config.ckpt.allow_model_changes)
        # The loss scale of float16; with that of the first step, gradients might overflow.
        optimizer.load_state_dict(saved.optimizer.model_dump())
    return trainer


def _run(trainer: Trainer, loader: TrainLoader, step: int) -> Iterator[_Replayed]:
    """Run forward and backward passes for each row of the step, while all other rows of the batch are padding."""
    optimizer, plan = trainer.optimizer, loader.plan
    ranks = range(plan.data_size)
    places = [(rank, index, row) for rank in ranks for index, row in enumerate(plan.rows(step, rank))]
    results: list[Tensor] = []
    trainer.train()
    for data_rank, _, row in places:
        batch = _batch_of(loader, row if data_rank == gpc.get_local_rank(ParallelMode.DATA) else None, step)
        optimizer.begin_step(micro_batches=len(batch[1]))
        result = trainer.scheduler.forward_backward_step(
            trainer,
            iter([batch]),
            training=TrainingStep(step=step, loss_scale=optimizer.loss_scale, after_backward=optimizer.begin_reduction),
        )
        norm = optimizer.gradient_norm()
        results.append(torch.stack([*result.sums.sum(1)[[TOKENS, LOSS]], norm]))
    # Read once, after the last pass.
    for place, (tokens, loss_sum, norm) in zip(places, to_host(torch.stack(results), "replay").tolist(), strict=True):
        yield _Replayed(*place, int(tokens), loss_sum / tokens if tokens else math.nan, norm)


def _batch_of(loader: TrainLoader, row: int | None, step: int) -> Batch:
    """Return a batch with one row, or with none, and as much padding as the pipeline needs."""
    pipeline, round_size = gpc.config.parallel.pipeline, loader.plan.round_size
    # A schedule needs a micro-batch for each stage; one of the user's own is made for the number of a step.
    least = loader.plan.micro_batches(step) if pipeline.table else pipeline.size
    rows = [padding_row(loader.rows.shape)] * (-(-least // round_size) * round_size)
    if row is not None:
        rows[0] = loader.rows[row]
    return loader.collate_fn(rows)


def _print(
    arguments: argparse.Namespace, evidence: StepEvidence, located: LocatedStep, replayed: list[_Replayed]
) -> None:
    rows, before = located.plan.rows_of_step(arguments.step), evidence.before
    tokens = sum(entry.tokens for entry in replayed)
    loss = math.fsum(entry.loss * entry.tokens for entry in replayed if entry.tokens) / tokens if tokens else math.nan
    saved_at = before.state.train_state.step if before else 0
    where = before.where if before else None
    if saved_at < arguments.step:
        others = f"since those before step {arguments.step} were not saved"
        log.warning(f"the parameters are those before step {saved_at}, {others}")
    if arguments.json:
        content: dict[str, Any] = {"step": arguments.step, **rows._asdict(), "checkpoint": where, "saved_at": saved_at}
        content |= {"confirmed_by": located.confirmed_by or None, "contradiction": located.contradiction or None}
        print_json({**content, "tokens": tokens, "loss": loss, "micro_batches": [e._asdict() for e in replayed]})
        return
    say(f"step {arguments.step}: batch {rows.batch}, rows {rows.first_row} to {rows.first_row + rows.rows - 1}")
    say(f"parameters: {where or 'the initial values'}")
    lines = [[*map(str, entry[:4]), f"{entry.loss:.6f}", f"{entry.grad_norm:.6g}"] for entry in replayed]
    head = ("data rank", "micro-batch", "row", "tokens", "loss", "gradient norm")
    for line in table([head, *lines], right=range(6)):
        say(line)
    say(f"loss of the step: {loss:.6f}")
