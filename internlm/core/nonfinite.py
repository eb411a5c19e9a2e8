"""Attribution of a skipped step: the ranks whose loss is inf or NaN, and the first parameter whose gradient is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from internlm.accelerator import HostValues
from internlm.solver.optimizer import HybridZeroOptimizer, OptimizerStep
from internlm.utils.errors import Problem


@dataclass(frozen=True)
class NonFinite:
    """Non-finite loss and gradients of one rank in a skipped step."""

    loss: bool = False
    """Whether the loss of this rank's tokens is."""
    gradient: str | None = None
    """First parameter, in model order, whose gradient is before it is reduced, if that was checked."""
    reduced: str | None = None
    """First parameter of this rank's shards whose reduced gradient is."""


def find_on_this_rank(
    optimizer: HybridZeroOptimizer, update: OptimizerStep, local_losses: Sequence[HostValues]
) -> NonFinite:
    """Find what is inf or NaN on this rank in the skipped step ``update``, from values that arrived on the host.

    Args:
        optimizer: Optimizer that made the step.
        update: Result of the optimizer step.
        local_losses: Losses of this rank in the passes whose gradients it used.
    """
    local = update.local_gradients
    return NonFinite(
        loss=not all(math.isfinite(loss.read_arrived()) for loss in local_losses),
        gradient=local.first_nonfinite() if local else None,
        reduced=optimizer.first_nonfinite(update),
    )


def find_on_all_ranks(
    optimizer: HybridZeroOptimizer, update: OptimizerStep, local_losses: Sequence[HostValues]
) -> list[NonFinite]:
    """Return what :func:`find_on_this_rank` finds on each rank.

    Collective: all ranks skip the same steps, so all of them can call this function.
    """
    own = find_on_this_rank(optimizer, update, local_losses)
    found = [own]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, own)
    return found


def format_nonfinite(found: Sequence[NonFinite]) -> str:
    """Describe what the ranks found, such as ``loss on rank 1, first in norm.weight on rank 1``."""
    parts = []
    ranks = [str(rank) for rank, of_rank in enumerate(found) if of_rank.loss]
    if ranks:
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} of {len(found)} ranks, first rank {ranks[0]}"
        parts.append(f"loss on {where}")
    gradients = [(rank, of_rank.gradient) for rank, of_rank in enumerate(found) if of_rank.gradient]
    reduced = [of_rank.reduced for of_rank in found if of_rank.reduced]
    if gradients:
        parts.append("first in {1} on rank {0}".format(*gradients[0]))
    elif reduced:
        parts.append(f"first in the reduced gradient of {reduced[0]}")
    return ", ".join(parts)


def too_many_skipped_steps(step: int, update: OptimizerStep, found: Sequence[NonFinite]) -> Problem:
    """Return the error for too many skipped steps, the last of which is ``step``."""
    where = format_nonfinite(found)
    if not any(of_rank.gradient or of_rank.loss for of_rank in found):
        where = f"no local gradient is non-finite; the reduced sum overflowed{where and f', {where}'}"
    message = f"{update.skipped_in_a_row} steps in a row were skipped, since the loss or gradients were inf or NaN"
    todo = "Resume from an older checkpoint with a lower learning rate, or check the data of these steps"
    return Problem(f"step {step}", f"{message} ({where})", todo)
