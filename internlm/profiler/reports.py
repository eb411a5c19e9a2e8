"""Where the memory of a run lies, part by part.

Torch traces of a few steps.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

from internlm.core.parallel.fully_sharded import local_shard
from internlm.solver.optimizer import HybridZeroOptimizer

PARAMETERS = "parameters"
GRADIENTS = "gradients"
MAIN = "main parameters"
REDUCTION = "reduction buffers"
GATHER = "gather buffers"
ACTIVATIONS = "activations"


def state(name: str) -> str:
    """What a part of the optimizer's state is called."""
    return f"optimizer: {name}"


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_between_steps(model: nn.Module, optimizer: HybridZeroOptimizer) -> dict[str, int]:
    """Bytes of each part that this rank holds all the time, padding included, each storage once."""
    groups = optimizer.groups
    parameters = _storages(local_shard(parameter).flat for parameter in model.parameters())
    parts = {
        PARAMETERS: parameters,
        GRADIENTS: _storages(grad for group in groups for grad in (group.grads, *group.grad_parts)),
        MAIN: _storages(part for group in groups for part in group.main_parts),
    }
    for group in groups:
        for name, tensor in optimizer.state_of(group).items():
            parts.setdefault(state(name), {}).update(_storages([tensor]))
    parts[MAIN] = {at: size for at, size in parts[MAIN].items() if at not in parameters}
    return {part: sum(storages.values()) for part, storages in parts.items()}


def memory_report(model: nn.Module, optimizer: HybridZeroOptimizer, plan: Mapping[str, int] | None = None) -> str:
    """What this rank holds, in MB, beside what ``plan`` says; parameters also by module; and the peak of the process
    (and of CUDA)."""
    measured, planned = held_between_steps(model, optimizer), plan or {}
    rows = [(part, measured.get(part), planned.get(part)) for part in {**measured, **planned}]
    rows += [("all", sum(measured.values()), sum(planned.values()) or None)]
    rows += [(f"{PARAMETERS} of {name}", _of_module(module), None) for name, module in model.named_children()]
    rows += [("peak of the process", peak_rss_bytes(), None)]
    if torch.cuda.is_available():
        rows += [("peak of CUDA", torch.cuda.max_memory_allocated(), None)]
    lines = [f"{'held, MB':>12} {'planned, MB':>12}"]
    lines += [f"{in_mb(size):>12} {in_mb(of_plan):>12}  {part}" for part, size, of_plan in rows]
    return "\n".join(lines) + "\n"


def in_mb(size: int | None) -> str:
    """Bytes as a number of MB, 2**20 bytes; None: a dash."""
    return "-" if size is None else f"{size / 2**20:.1f}"


def _of_module(module: nn.Module) -> int:
    return sum(local_shard(parameter).flat.nbytes for parameter in module.parameters())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of what ``tensors`` lie in."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


WAIT, WARMUP, ACTIVE = 1, 1, 3  # steps


class StepTrace:
    """Traces steps 2–4 of a run into ``folder``, one file a rank, to be opened in Perfetto or chrome://tracing."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"trace-rank{rank}.json"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self._path)),
            record_shapes=True,
        )

    def start(self) -> None:
        """Begin with the first step."""
        self._profile.start()

    def step(self) -> None:
        """A step is done."""
        self._profile.step()

    def stop(self) -> None:
        """The run is over."""
        self._profile.stop()
