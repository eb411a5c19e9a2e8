"""What the run will hold, before it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.trainer import Hook, Trainer
from internlm.model.decoder import Decoder
from internlm.train.memory import Plan, memory_plan, told
from internlm.utils.logger import get_logger

T = TypeVar("T")
log = get_logger()


class TellMemoryPlan(Hook):
    """The memory plan before the first step; on the rank that logs only."""

    def before_run(self, trainer: Trainer) -> None:
        if not isinstance(trainer.model, Decoder):  # whatever the config says
            log.info("Memory plan: there is no formula for this model")
        elif text := _attempt(lambda: told(gpc.config, dist.get_world_size()), ""):
            log.info(text)


def own_plan(model: nn.Module) -> Plan:
    """The plan of this rank; empty where there is no formula for ``model``."""
    stage, zero_rank = map(gpc.get_local_rank, (ParallelMode.PIPELINE, ParallelMode.ZERO1))

    def make() -> Plan:
        return memory_plan(gpc.config, dist.get_world_size(), stage=stage, zero_rank=zero_rank)

    return _attempt(make, {}) if isinstance(model, Decoder) else {}


def _attempt(make: Callable[[], T], otherwise: T) -> T:
    """A formula that is wrong is no reason to end a run."""
    try:
        return make()
    except Exception as error:
        log.warning(f"the memory plan could not be made: {error!r}")
        return otherwise
