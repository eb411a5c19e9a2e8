"""The trainer from its parts."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from internlm import accelerator
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.scheduler import NonPipelineScheduler, TokenCrossEntropy
from internlm.core.trainer import Trainer
from internlm.solver.optimizer import HybridZeroOptimizer


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
    tokens = ParallelMode.ISP_DATA if gpc.config.parallel.tensor.mode == "isp" else ParallelMode.DATA
    scheduler = NonPipelineScheduler(model, criterion, types, gpc.group(tokens), accelerator.current_device())
    return Trainer(model, optimizer, scheduler, lr_scheduler, beta2_scheduler)
