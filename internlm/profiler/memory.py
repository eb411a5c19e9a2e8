"""Where the memory of a run lies, by its owner."""

from __future__ import annotations

import resource
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from internlm.solver.optimizer import HybridZeroOptimizer


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_report(model: nn.Module, optimizer: HybridZeroOptimizer) -> str:
    """Parameters by module, gradients and optimizer state of this rank, in MB, and the peak of the process (and of
    CUDA)."""
    rows = [(f"parameters {name}", _bytes(module.parameters())) for name, module in model.named_children()]
    rows += [("gradients", _bytes(group.grads for group in optimizer.groups))]
    rows += [
        (f"optimizer {key}", _bytes([optimizer.state_of(group)[key]]))
        for group in optimizer.groups
        for key in ("exp_avg", "exp_avg_sq")
    ]
    rows += [("peak of the process", peak_rss_bytes())]
    if torch.cuda.is_available():
        rows += [("peak of CUDA", torch.cuda.max_memory_allocated())]
    return "\n".join(f"{size / 2**20:12.1f} MB  {name}" for name, size in rows) + "\n"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
