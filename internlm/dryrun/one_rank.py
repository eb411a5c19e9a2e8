"""Run the training path of one rank on the pretended device, and record what it would do.

Groups, model, loader, schedule, optimizer and the hooks of every step are those of a run; collectives go to a process
group that sends nothing. Data are random, and nothing is read from or written to files.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from internlm import accelerator
from internlm.accelerator.kinds import CUDA
from internlm.accelerator.pretended import NAME, pretended_device
from internlm.config import Config, load_config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.blocks import declared_blocks
from internlm.core.parallel.ledger import LEDGER, Traffic
from internlm.core.trainer import Batch, Hook, Trainer
from internlm.costs import NoCostFormulaError, Plan, expected_traffic, memory_plan
from internlm.costs.memory_plan import ACTIVATIONS
from internlm.costs.rank_flops import product_flops
from internlm.data.loader import TrainLoader
from internlm.dryrun.call_order import TRANSFER, Call
from internlm.dryrun.watch import DeviceWatch, place_of
from internlm.initialize.build_trainer import initialize_trainer
from internlm.initialize.launch import initialize_distributed_env
from internlm.monitor import MetricsWriter
from internlm.ops.attention import why_unavailable
from internlm.profiler.reports import held_between_steps, tensors_between_steps
from internlm.train.build_data import build_train_loader_with_data_type
from internlm.train.build_model import create_model
from internlm.train.build_optimizer import initialize_optimizer
from internlm.train.hooks import FollowRequests, LogMetrics
from internlm.train.inventory import inventory_of
from internlm.train.parallelize import initialize_model_and_parallel_communicator
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import Problem, UserError
from internlm.utils.torch_private import errors_of_fake_tensors, fake_tensors, in_backward, join_fake_group

#: Overrides that keep files out of a dry run, and give all steps as many micro-batches as the formulas have.
OVERRIDES = (
    "data.type=tokenized",
    "data.train_folder=None",
    "data.valid_folder=None",
    "ckpt.enable_save_ckpt=False",
    "data.rampup_batch_size=",
)
#: Number of messages between stages that a rank may hold at once: received and to be sent, in both directions.
MESSAGES = 4
BUFFERS = "buffers"
"""Category of device tensors that exist before the first step and are in no row of the memory plan."""


@dataclass(kw_only=True)
class DryRun:
    """Record of a rank's dry run; counts without another note are those of its last step."""

    rank: int
    stage: int
    world_size: int
    build_seconds: float
    step_seconds: list[float] = field(default_factory=list)
    held: Plan = field(default_factory=dict)
    """Bytes between steps, and of activations at their peak, by row of the memory plan."""
    plan: Plan = field(default_factory=dict)
    """Bytes by formula, by row of the memory plan."""
    peak: Mapping[str, int] = field(default_factory=dict)
    """Bytes at the peak of the step, by category."""
    peak_place: str = ""
    """Line of code that reached the peak."""
    traffic: Traffic = field(default_factory=dict)
    """Calls and bytes, by parallel mode and collective."""
    expected: Traffic | None = None
    """Calls and bytes by formula; None for a model without formulas."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """Floating-point operations, by operator."""
    expected_flops: float | None = None
    """Floating-point operations by formula; None for a model without formulas."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Number of kernels, by operator."""
    host_reads: Counter[str] = field(default_factory=Counter)
    """Number of host syncs, by reason."""
    faults: Mapping[str, int] = field(default_factory=dict)
    """Number of occurrences of each fault in all steps."""
    events: Sequence[Call] = ()
    """Collectives of all steps, in order."""
    message_bytes: int = 0
    """Size of the messages between stages that may be held at once; no formula has them."""

    @property
    def has_attention_kernel(self) -> bool:
        """Whether attention ran as one operator: else, it saves what no formula has."""
        return any("attn" in name or "attention" in name for name in self.kernels)


def dry_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str], world_size: int) -> Config:
    """Resolve a config for a dry run, without the files that it names.

    Raises:
        ConfigError: The config is invalid.
    """
    config = load_config(source, (*overrides, *OVERRIDES), world_size, CUDA.name)
    model = config.model
    with pretended_device():
        no_varlen = why_unavailable("varlen", NAME, torch_dtype(str(model.dtype)), model.head_size)
    if model.attention_backend == "auto":
        backend = "sdpa" if no_varlen or not model.use_flash_attn else "varlen"
    elif model.attention_backend == "flash" and not no_varlen:
        backend = "varlen"  # it saves what flash saves, and can be pretended without the package flash-attn
    else:
        return config
    return load_config(source, (*overrides, *OVERRIDES, f"model.attention_backend={backend}"), world_size, CUDA.name)


def run_rank(config: Config, world_size: int, rank: int, steps: int, seed: int = 1024) -> DryRun:
    """Run ``steps`` training steps of ``rank`` in a world of ``world_size`` ranks.

    Args:
        config: Result of :func:`dry_config`.
        world_size: Number of ranks of the run.
        rank: Rank to run.
        steps: Number of steps. The first step is unlike the others: it learns shapes and counts.
        seed: Seed of the run.

    Raises:
        UserError: A part of the run refuses its input.
    """
    with pretended_device(), _fake_world(config, world_size, rank, seed), fake_tensors() as fakes:
        start = time.perf_counter()
        model, communicator = initialize_model_and_parallel_communicator(create_model(deferred=True))
        optimizer, beta2, lr = initialize_optimizer(model, communicator)
        with accelerator.with_values():
            loader, types = build_train_loader_with_data_type()
        trainer = initialize_trainer(model, optimizer, lr, beta2, types=len(types))
        trainer.train()
        stage = gpc.get_local_rank(ParallelMode.PIPELINE)
        seconds = time.perf_counter() - start
        record = DryRun(rank=rank, stage=stage, world_size=world_size, build_seconds=seconds)
        watch = _watch(trainer, DeviceWatch(rank, fakes))
        batches, hooks = _read(loader, steps), _hooks(trainer, types, loader)
        with watch.watching_resizes(), watch:
            for _ in range(steps):
                _step(trainer, batches, hooks, watch, record)
        _conclude(record, trainer, watch, len(types))
    return record


def _hooks(trainer: Trainer, types: Sequence[str], loader: TrainLoader) -> list[Hook]:
    """Return the hooks that run after every step and write no file; metrics are read on each rank, and go nowhere."""
    data_size, writer = trainer.scheduler.data_group.size, MetricsWriter([])
    metrics = LogMetrics(gpc.config, types, dist.get_world_size(), data_size, writer, loader)
    return [metrics, FollowRequests(accelerator.current_device())]


def _step(
    trainer: Trainer, batches: Iterator[Batch], hooks: Sequence[Hook], watch: DeviceWatch, record: DryRun
) -> None:
    watch.start_step()
    start, sent, reads = time.perf_counter(), LEDGER.snapshot(), accelerator.host_reads()
    try:
        report = trainer.train_step(batches)
        for hook in hooks:
            hook.after_step(trainer, report)
    except errors_of_fake_tensors() as error:  # such as that of nonzero, which needs values
        message = f"cannot run on the pretended device ({str(error).splitlines()[0]})"
        todo = "Compute on the device, with shapes that do not depend on values"
        raise UserError(Problem(place_of(error), message, todo)) from error
    record.step_seconds.append(time.perf_counter() - start)
    record.traffic, record.host_reads = LEDGER.since(sent), accelerator.host_reads() - reads


def _conclude(record: DryRun, trainer: Trainer, watch: DeviceWatch, types: int) -> None:
    """Copy the record of ``watch``, and compute what the formulas expect."""
    memory = watch.memory
    record.held = {**held_between_steps(trainer.model, trainer.optimizer), ACTIVATIONS: memory.kept}
    record.peak, record.peak_place = memory.peak, memory.peak_place
    record.flops, record.kernels = dict(watch.flops), dict(watch.kernels)
    record.faults, record.events = dict(watch.faults), tuple(watch.events)
    record.message_bytes = MESSAGES * max((event.nbytes for event in watch.events if event.name == TRANSFER), default=0)
    inventory = inventory_of(trainer.model, gpc.config, record.world_size, record.stage)
    zero_rank = gpc.get_local_rank(ParallelMode.ZERO1)
    try:
        record.plan = memory_plan(inventory, zero_rank=zero_rank, device_type=NAME)
        record.expected = expected_traffic(inventory, types=types, device_type=NAME, zero_rank=zero_rank)
        record.expected_flops = product_flops(inventory.symbols)
    except NoCostFormulaError:
        record.expected = None


def _watch(trainer: Trainer, watch: DeviceWatch) -> DeviceWatch:
    """Register the tensors that exist between steps, and what marks activations as complete; return ``watch``."""
    for row, tensors in tensors_between_steps(trainer.model, trainer.optimizer).items():
        watch.memory.see_all(tensors, row)
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    # Those of an earlier dry run may be alive if it has failed.
    watch.memory.see_all((tensor for tensor in tensors if getattr(tensor, "fake_mode", None) is watch.fakes), BUFFERS)

    def keep(*_: object) -> None:
        if not in_backward():  # a recomputed block saves nothing for later
            watch.memory.keep(ACTIVATIONS)

    model: nn.Module = trainer.model
    for module in declared_blocks(model).values():
        module.register_forward_hook(keep)
    trainer.scheduler.after_action = watch.end_action
    return watch


def _read(loader: TrainLoader, steps: int) -> Iterator[Batch]:
    """Yield the batches of the first steps, whose tensors have values."""
    for step in range(steps):
        with accelerator.with_values():
            batch = loader.read(step)
        yield batch


@contextmanager
def _fake_world(config: Config, world_size: int, rank: int, seed: int) -> Iterator[None]:
    """Join a process group of ``world_size`` ranks that sends nothing, and make the parallel groups."""
    join_fake_group(rank, world_size)
    try:
        initialize_distributed_env(config, rank=rank, world_size=world_size, local_rank=0, host="localhost", seed=seed)
        yield
    finally:
        gpc.destroy()
        dist.destroy_process_group()
