"""``internlm verify`` on the ranks of the pool. The reference of each config is run once a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from internlm.verify.compare import Report, compare
from internlm.verify.configs import Plan, make_plan
from internlm.verify.record import RankRecord
from internlm.verify.run import run_rank
from tests.dist.tiny import TINY, share_of_batch
from tests.harness.pool import run_ranks

STEPS = 2
#: Most micro-batches of a rank without a pipeline: enough to accumulate gradients.
MOST_MICRO_BATCHES = 2

_references: dict[tuple[Any, ...], RankRecord] = {}


def run(rank: int, world_size: int, *args: Any) -> RankRecord:
    """Call :func:`run_rank`. To find this function, a worker imports this module, so that it knows the user's model."""
    return run_rank(rank, world_size, *args)


Run = Callable[..., RankRecord]


def verify(
    ranks: int, overrides: Sequence[str], *, steps: int = STEPS, dtype: str = "float64", function: Run = run
) -> tuple[Report, list[RankRecord]]:
    """Compare :data:`TINY` with ``overrides`` on several ranks, which share its global batch, with one process.

    ``function`` is what every rank calls.
    """
    plan = plan_of(ranks, overrides, steps=steps, dtype=dtype)
    records = run_ranks(ranks, function, plan.config, plan.seed, plan.steps)
    return compare(plan.config, reference(plan, function), records), records


def plan_of(ranks: int, overrides: Sequence[str], *, steps: int = STEPS, dtype: str = "float64") -> Plan:
    """Resolve :data:`TINY` with ``overrides``, of which ``data.micro_num`` replaces the share of the global batch."""
    share = share_of_batch(ranks, overrides, MOST_MICRO_BATCHES)
    return make_plan(TINY, (share, *overrides), ranks, steps=steps, dtype=dtype)


def reference(plan: Plan, function: Run = run) -> RankRecord:
    """Run ``plan`` on one process, or return the record of an earlier run."""
    key = function, plan.reference.model_dump_json(), plan.seed, plan.steps, plan.data_size
    if key not in _references:
        (_references[key],) = run_ranks(1, function, plan.reference, plan.seed, plan.steps, plan.data_size)
    return _references[key]
