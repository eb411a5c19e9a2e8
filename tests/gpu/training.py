"""Short runs of training steps on ranks of any device, with what a GPU must not do in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from internlm import accelerator
from internlm.core.parallel.offload import tensors_of
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.profiler.reports import held_between_steps, memory_report
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.train.hooks.log import own_plan
from tests.dist.tiny import TINY, share_of_batch

#: Steps in which shapes are learned and kernels compiled.
WARMUP = 2
STEPS = 4


@dataclass(kw_only=True)
class Trained:
    """Record of a run on one rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    is_pinned: bool = False
    """Whether all tensors of a batch are in pinned memory."""
    report: str = ""
    """Memory report."""
    held: dict[str, int] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)


def train(rank: int, world_size: int, overrides: Sequence[str]) -> Trained:
    """Train :data:`TINY` with ``overrides``; after :data:`WARMUP` steps, a host sync within a step is an error."""
    try:
        return _train(world_size, overrides)
    finally:  # settings of torch, which the next run in this process would keep
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.set_float32_matmul_precision("highest")


def _train(world_size: int, overrides: Sequence[str]) -> Trained:
    initialize_distributed_env(TINY, overrides=(share_of_batch(world_size, overrides), *overrides))
    model, communicator = initialize_model_and_parallel_communicator(create_model(deferred=True))
    loader, types = build_train_loader_with_data_type()
    optimizer, beta2, lr = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr, beta2, types=len(types))
    trainer.train()
    record = Trained()
    for step in range(STEPS):
        batch = loader.read(step)
        with no_host_sync(step >= WARMUP):
            report = trainer.train_step(iter([batch]))
        report.read()
        record.losses.append(report.result.loss)
        record.norms.append(report.update.grad_norm)
    record.skipped = trainer.state.inf_nan_skip_batches
    record.is_pinned = all(map(Tensor.is_pinned, tensors_of(batch)))
    record.plan = dict(own_plan(model))
    record.report = memory_report(model, optimizer, record.plan)
    record.held = held_between_steps(model, optimizer)
    return record


@contextmanager
def no_host_sync(active: bool) -> Iterator[None]:
    """Raise an error for a host sync within the block: where torch waits for a GPU, and at the end for a read."""
    if not active:
        yield
        return
    on_gpu, before = not accelerator.device_kind().is_host, accelerator.host_reads()
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    assert accelerator.host_reads() == before, "a step reads values of the device"
