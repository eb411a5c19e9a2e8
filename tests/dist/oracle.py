"""One process to compare with, run once a session for each config, however many layouts are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from internlm.verify.configs import Plan
from internlm.verify.record import RankRecord
from internlm.verify.run import run_rank
from tests.dist import equivalence
from tests.harness.pool import run_ranks

T = TypeVar("T")

TINY = equivalence.TINY
STEPS = 2

_known: dict[tuple[Any, ...], Any] = {}


def run(rank: int, world_size: int, *args: Any) -> RankRecord:
    """:func:`run_rank`. That a worker finds this function makes it know the models of :mod:`tests.dist.equivalence`."""
    return run_rank(rank, world_size, *args)


def alone(plan: Plan, function: Callable[..., T] = run) -> T:  # type: ignore[assignment]
    """What ``function``, called like :func:`run`, gives on one process for ``plan``."""
    key = function, plan.reference.model_dump_json(), plan.seed, plan.steps, plan.data_size
    if key not in _known:
        (_known[key],) = run_ranks(1, function, plan.reference, plan.seed, plan.steps, plan.data_size)
    result: T = _known[key]
    return result
