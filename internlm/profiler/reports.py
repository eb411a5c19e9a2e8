"""Memory report of a rank, with measured and planned bytes, and torch profiler traces of a few steps."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import profile, schedule

from internlm import accelerator
from internlm.core.parallel.fully_sharded import local_shard
from internlm.costs.memory_plan import GRADIENTS, MAIN, PARAMETERS, TOTAL, format_bytes, optimizer_row
from internlm.solver.optimizer import HybridZeroOptimizer


def peak_rss_bytes() -> int:
    """Return the peak resident set size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def held_between_steps(model: nn.Module, optimizer: HybridZeroOptimizer) -> dict[str, int]:
    """Return the bytes that this rank holds between two steps, by row of the memory plan.

    Padding is included, and every storage is counted once: parameters are views of the optimizer's flat buffers.
    """
    rows = {row: _storages(tensors) for row, tensors in tensors_between_steps(model, optimizer).items()}
    # In float32 the main parameters are the parameters themselves, which the plan counts only once too.
    rows[MAIN] = {storage: size for storage, size in rows[MAIN].items() if storage not in rows[PARAMETERS]}
    return {row: sum(storages.values()) for row, storages in rows.items()}


def tensors_between_steps(model: nn.Module, optimizer: HybridZeroOptimizer) -> dict[str, list[Tensor]]:
    """Return the tensors that this rank holds between two steps, by row of the memory plan."""
    groups = optimizer.groups
    rows = {
        PARAMETERS: [local_shard(parameter).flat for parameter in model.parameters()],
        GRADIENTS: [grad for group in groups for grad in (group.grads, *group.grad_shards)],
        MAIN: [part for group in groups for part in group.main_shards],
    }
    # Groups with the same rule share a row, as in the plan.
    for group in groups:
        for name, tensor in optimizer.state_of(group).items():
            rows.setdefault(optimizer_row(name), []).append(tensor)
    return rows


def memory_report(model: nn.Module, optimizer: HybridZeroOptimizer, plan: Mapping[str, int] | None = None) -> str:
    """Format a table of the bytes that this rank holds and the bytes that the memory plan expects, by row.

    Further lines give the bytes of each child module's parameters, and the peak memory of the process and of CUDA.

    Args:
        model: Model of this rank.
        optimizer: Optimizer of the model.
        plan: Planned bytes by row; if None, the ``planned`` column contains only dashes.
    """
    measured, planned = held_between_steps(model, optimizer), plan or {}
    # Rows on one side only keep a line: activations are planned but not held between steps.
    rows = [(row, measured.get(row), planned.get(row)) for row in {**measured, **planned}]
    rows += [(TOTAL, sum(measured.values()), sum(planned.values()) or None)]
    rows += [(f"{PARAMETERS} of {name}", _module_bytes(module), None) for name, module in model.named_children()]
    rows += [("peak of the process", peak_rss_bytes(), None)]
    # Allocated rather than reserved memory: the plan has no row for the caching allocator's fragmentation.
    if not accelerator.device_kind().is_host:
        rows += [("peak of the device", accelerator.peak_memory(), None)]
    lines = [f"{'held':>12} {'planned':>12}"]
    lines += [f"{format_bytes(held):>12} {format_bytes(expected):>12}  {row}" for row, held, expected in rows]
    return "\n".join(lines) + "\n"


def _module_bytes(module: nn.Module) -> int:
    return sum(local_shard(parameter).flat.nbytes for parameter in module.parameters())


def _storages(tensors: Iterable[Tensor]) -> dict[torch.UntypedStorage, int]:
    """Return the bytes of the storages of ``tensors``: many are views of one flat buffer, whose padding counts too."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage: storage.nbytes() for storage in storages}


WAIT, WARMUP, ACTIVE = 1, 1, 3  # steps: the first fills caches, the second absorbs the profiler's own start-up


class StepTrace:
    """Profiler that writes a trace of steps 3–5 for Perfetto or chrome://tracing.

    Args:
        folder: Folder of the traces, created if missing.
        rank: Rank of this process, part of the file name ``trace-rank<rank>.json``.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"trace-rank{rank}.json"
        self._profile = profile(
            activities=accelerator.profiler_activities(),
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self._path)),
            record_shapes=True,
        )

    def start(self) -> None:
        """Start the profiler; call it before the first step."""
        self._profile.start()

    def step(self) -> None:
        """Advance the profiler's schedule; call it at the end of each step."""
        self._profile.step()

    def stop(self) -> None:
        """Stop the profiler; if it is still tracing, write the trace of the steps so far."""
        self._profile.stop()
