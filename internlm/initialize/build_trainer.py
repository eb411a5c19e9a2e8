"""Construction of the trainer: its scheduler and pipeline channels, from the global config."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from internlm import accelerator
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.group import Group
from internlm.core.parallel.dropout import DropoutKey
from internlm.core.scheduler import NonPipelineScheduler, Scheduler, TokenCrossEntropy
from internlm.core.scheduler.actions import Table
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.schedulers import SCHEDULERS, Pipeline
from internlm.core.scheduler.table import schedule_of
from internlm.core.trainer import Trainer
from internlm.costs.stages import own_table
from internlm.solver.lr_schedules import Beta2Schedule, LRSchedule
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.compat import naming_current_call
from internlm.utils.errors import ConfigError, Problem, UserError, format_by_rank

CALL = "initialize_trainer(model, optimizer, lr_scheduler, beta2_scheduler)"
#: Keywords of older versions, and what replaces them if they have a value; None: they are taken.
OLDER_KEYWORDS = {
    "train_dataloader": None,
    "test_dataloader": None,
    "scheduler_hooks": "Remove it: trainer.execute_schedule returns the loss and, on request, the outputs",
}


@naming_current_call(CALL)
def initialize_trainer(
    model: nn.Module,
    optimizer: HybridZeroOptimizer,
    lr_scheduler: Callable[[int], float],
    beta2_scheduler: Callable[[int], float],
    criterion: TokenCrossEntropy | None = None,
    types: int = 1,
    **older: Any,
) -> Trainer:
    """Build a :class:`Trainer` with the scheduler that the global config selects.

    Args:
        model: Initialised model with its communicators.
        optimizer: Optimizer built by :func:`~internlm.train.initialize_optimizer`, which also builds both schedules.
        lr_scheduler: Learning-rate schedule, a function of the step.
        beta2_scheduler: Schedule of Adam's beta2, a function of the step.
        criterion: Loss function; default: cross-entropy with the config's label smoothing.
        types: Number of dataset types by which metrics are split; 1: all tokens count as one type.
        older: Keywords of older versions of InternEvo. With ``train_dataloader`` (and ``test_dataloader``) the result
            unpacks to (trainer, train_dataloader, test_dataloader, lr_scheduler). ``scheduler_hooks`` must be empty.

    Raises:
        UserError: An argument has no meaning here, or is of the wrong kind; or the custom schedule is invalid, or
            differs between ranks.
    """
    _check_older(older)
    _check_parts(model, optimizer, types)
    _check_schedules(lr_scheduler, beta2_scheduler)
    if criterion is None:
        criterion = TokenCrossEntropy(model, gpc.config.loss.label_smoothing)
    _check_criterion(criterion)
    trainer = Trainer(model, optimizer, build_scheduler(criterion, types), lr_scheduler, beta2_scheduler)
    if older.get("train_dataloader") is not None:
        trainer.unpack_to(older["train_dataloader"], older.get("test_dataloader"), lr_scheduler)
    return trainer


def _check_older(keywords: Mapping[str, Any]) -> None:
    problems = []
    for name, value in keywords.items():
        where = f"initialize_trainer({name}=...)"
        if name not in OLDER_KEYWORDS:
            problems.append(Problem(where, "unknown keyword", f"Call {CALL}"))
        elif (todo := OLDER_KEYWORDS[name]) and value:
            problems.append(Problem(where, "does not exist in this version", todo))
    if problems:
        raise UserError(*problems)


def _check_parts(model: object, optimizer: object, types: object) -> None:
    if not isinstance(model, nn.Module):
        message = f"expected one nn.Module, got {type(model).__name__}"
        todo = "Pass the model that initialize_model_and_parallel_communicator returns"
        raise UserError(Problem("initialize_trainer(model=...)", message, todo))
    if not isinstance(optimizer, HybridZeroOptimizer):
        message = f"expected the optimizer of initialize_optimizer, got {type(optimizer).__name__}"
        todo = "Choose the update rule by optimizer.type in the config"
        raise UserError(Problem("initialize_trainer(optimizer=...)", message, todo))
    if isinstance(types, bool) or not isinstance(types, int) or types < 1:
        message = f"expected a number of dataset types of at least 1, got {types!r}"
        raise UserError(Problem("initialize_trainer(types=...)", message, "Pass len(dataset_types), or omit it"))


def _check_schedules(lr_scheduler: object, beta2_scheduler: object) -> None:
    """Check that both schedules are functions of the step, and not each in the place of the other."""
    todo = "initialize_optimizer returns (optimizer, beta2_scheduler, lr_scheduler)"
    others = (("lr_scheduler", lr_scheduler, Beta2Schedule), ("beta2_scheduler", beta2_scheduler, LRSchedule))
    for name, schedule, other in others:
        if isinstance(schedule, (type, nn.Module, other)) or not _takes(schedule, "step"):
            message = f"expected a function of the step, got {_described(schedule)}"
            raise UserError(Problem(f"initialize_trainer({name}=...)", message, f"{todo}; call {CALL}"))


def _check_criterion(criterion: object) -> None:
    function = getattr(criterion, "forward", criterion)  # a module is called by its forward
    if isinstance(criterion, type) or not _takes(function, "inputs", "labels", "grad_scale"):
        message = f"expected a function of (inputs, labels, grad_scale), got {_described(criterion)}"
        todo = "Omit it: the loss is the cross-entropy of tokens, with loss.label_smoothing of the config"
        raise UserError(Problem("initialize_trainer(criterion=...)", message, todo))


def _takes(function: object, *arguments: str) -> bool:
    """Return whether ``function`` can be called with as many positional arguments as ``arguments`` has."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):  # ValueError: a function without a signature, such as max
        return False
    return True


def _described(value: object) -> str:
    """Return a function or class by its name, with its signature if it has one; any other value by its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = getattr(value, "__name__", None)
    if name is None:
        return type(value).__name__
    try:
        return f"{name}{inspect.signature(value)}"  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(name)


def build_scheduler(criterion: TokenCrossEntropy, types: int) -> Scheduler:
    """Build the scheduler that the global config selects; collective in a pipeline.

    Args:
        criterion: Loss function, which runs the model.
        types: Number of dataset types by which sums are split; 1: all tokens count as one type.

    Raises:
        ConfigError: The custom schedule is invalid, or differs between ranks.
    """
    # The group of ranks with different tokens. Under isp it includes the ranks that split a row.
    mode = ParallelMode.ISP_DATA if gpc.config.parallel.tensor.mode == "isp" else ParallelMode.DATA
    tokens, device = gpc.group(mode), accelerator.current_device()
    config, chunks = gpc.config.parallel.pipeline, gpc.config.model.num_chunks
    micro_batch_group = None
    if gpc.config.loss.average == "micro_batch":
        # isp alone splits a row before it is read; msp and fsp do so inside the model, whose loss has all tokens.
        isp = mode is ParallelMode.ISP_DATA
        micro_batch_group = gpc.group(ParallelMode.TENSOR) if isp else Group(ParallelMode.TENSOR)
    dropout_key = DropoutKey(
        seed=gpc.seed,
        data_rank=gpc.get_local_rank(ParallelMode.DATA),
        tensor_rank=gpc.get_local_rank(ParallelMode.TENSOR),
    )
    if config.size * chunks == 1:
        return NonPipelineScheduler(
            criterion, types, tokens, device, dropout_key=dropout_key, micro_batch_group=micro_batch_group
        )
    schedule = schedule_of(config.mode, chunks)
    pipeline = Pipeline(
        gpc.group(ParallelMode.PIPELINE),
        chunks,
        _channels(schedule) if config.size > 1 else None,
        own_table(gpc.config),
    )
    scheduler = SCHEDULERS[schedule](criterion, types, tokens, device, pipeline, dropout_key, micro_batch_group)
    _check_agreement(scheduler.table(gpc.config.data.micro_num))  # also refuses an invalid table before the run
    return scheduler


def _check_agreement(table: Table) -> None:
    """Check that all ranks have the same schedule; otherwise unmatched sends and receives would block."""
    tables: list[str] = [""] * dist.get_world_size()
    digest = hashlib.sha256(repr(table.actions).encode()).hexdigest()
    with accelerator.with_values():
        dist.all_gather_object(tables, f"SHA-256 {digest[:12]}")
    if len(set(tables)) > 1:
        message = f"differs between ranks ({format_by_rank(tables)})"
        raise ConfigError(Problem(table.schedule, message, "Copy the same file to all machines"))


def _channels(schedule: str) -> Channels:
    """Open the channels to and from the previous and next pipeline stages.

    In an interleaved schedule the last stage sends to the first, which holds the next chunk.
    """
    stage, config = gpc.group(ParallelMode.PIPELINE), gpc.config.parallel.pipeline
    incoming, outgoing = {}, {}
    for index, pairs in enumerate(_neighbours(stage.size, ring=schedule == "interleaved")):
        # A process group delivers messages in the order sent. A group per direction keeps a late message from
        # delaying the other direction.
        up, down = (gpc.pair_of_stages(f"{index} {direction}", pairs) for direction in ("up", "down"))
        for lower, upper in pairs:
            if stage.rank == lower:
                outgoing[upper], incoming[upper] = up, down
            if stage.rank == upper:
                outgoing[lower], incoming[lower] = down, up
    overlap = schedule != "interleaved" or config.interleaved_overlap
    return Channels(stage, incoming, outgoing, accelerator.current_device(), overlap)


def _neighbours(stages: int, ring: bool) -> list[list[tuple[int, int]]]:
    """Return the pairs of neighbouring stages as lists of disjoint pairs.

    Creating a process group blocks until both of its ranks join. The pairs of a list have no rank in common, so their
    groups are created concurrently.
    """
    lists = [[(rank, rank + 1) for rank in range(first, stages - 1, 2)] for first in (0, 1)]
    lists.append([(stages - 1, 0)] if ring and stages > 2 else [])
    return [pairs for pairs in lists if pairs]
