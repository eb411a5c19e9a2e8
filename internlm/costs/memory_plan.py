"""What a rank holds at its fullest: bytes by part, from the config alone.

The symbols are those of :mod:`internlm.costs.symbols`. Besides, of the parameters of each kind, which lie in
one flat buffer:

==========  =========================================================================================================
N, n        elements of the buffer, padding included, and those of them that this rank owns (of z ranks)
a           bytes of an element as gradients are accumulated: g, or e without ``fp32_grad_accum``
c           bytes of an element as gradients are reduced, ``reduce_comm_dtype``
==========  =========================================================================================================

Here e and g are those of the kind: with ``use_fp32_norm`` norms are of another type than the rest.

The plan as a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from internlm.config import Config
from internlm.core.parallel.sharding import GroupPosition
from internlm.costs.activations import peak_saved
from internlm.costs.gather_buffers import gather_buffers
from internlm.costs.parameters import buffers, kinds
from internlm.costs.symbols import Symbols
from internlm.costs.traffic import held_elements
from internlm.costs.traffic_model import share
from internlm.profiler.reports import ACTIVATIONS, GATHER, GRADIENTS, MAIN, PARAMETERS, REDUCTION, in_mb, state
from internlm.solver.optimizer.param_groups import ParamGroupKey
from internlm.solver.optimizer.zero_optimizer import UPDATE_RULES
from internlm.utils.dtype import torch_dtype, wide

#: Bytes by part.
Plan: TypeAlias = dict[str, int]


class GroupElements(NamedTuple):
    """The parameters of one kind: N, and n of each rank of the zero group."""

    kind: ParamGroupKey
    held: int
    owned: Sequence[int]


def memory_plan(
    config: Config, world_size: int, *, stage: int = 0, zero_rank: int | None = None, tokens: int | None = None
) -> Plan:
    """Bytes of each part on a rank of pipeline stage ``stage``, the one of the zero group that is ``zero_rank``;
    without it, the one that holds the most.

    ====================  =====================================================================================
    parameters            N·e
    gradients             N·a, and n·g for their sums where a is another type
    main parameters       n·g, where e is another type
    optimizer: (a state)  n·g, of the kinds whose rule keeps it
    reduction buffers     N·c, where gradients are accumulated in another type: all buckets may be on their way
    gather buffers        :func:`~internlm.costs.gather_buffers.gather_buffers`
    activations           :func:`~internlm.costs.activations.peak_saved`
    ====================  =====================================================================================

    Where the zero group shares parameters (``zero1.fsdp``) nothing lies in buffers that all of it has: n elements of
    each kind are here, for which N·g parameters are kept, N with rows that make all parts equal; gradients are n·g, and
    n·c is what the replicas sum, if there are any.

    ``tokens``: of a micro-batch, how many take part in the loss; without it, all. ``config`` is resolved. Raises
    KeyError for a model that is not ours.
    """
    s = Symbols.of(config, world_size, stage)
    lots = _lots(s)
    ranks = range(s.z.size) if zero_rank is None else [zero_rank]
    by_rank = [_optimizer(s, lots, rank) for rank in ranks]
    return {
        **max(by_rank, key=lambda parts: sum(parts.values())),
        GATHER: gather_buffers(s),
        ACTIVATIONS: peak_saved(config, world_size, tokens, stage=stage),
    }


def plans_of_stages(config: Config, world_size: int) -> list[Plan]:
    """Of each stage, the plan of the rank that holds the most."""
    return [memory_plan(config, world_size, stage=stage) for stage in range(config.parallel.pipeline.size)]


def _lots(s: Symbols) -> list[GroupElements]:
    ranks = range(s.z.size)
    if not s.shares_parameters:
        layouts = [(kind, buffer.layout) for kind, buffer in buffers(s).items()]
        return [GroupElements(kind, layout.numel, [layout.owned(rank) for rank in ranks]) for kind, layout in layouts]
    found = []
    for kind, members in kinds(s).items():
        owned = [sum(held_elements(each, GroupPosition(rank, s.z.size)) for each in members) for rank in ranks]
        found.append(GroupElements(kind, sum(share(each.rows, s.z) * each.width for each in members), owned))
    return found


def _optimizer(s: Symbols, lots: Sequence[GroupElements], zero_rank: int) -> Plan:
    """The parts that the optimizer owns."""
    parts = Counter(dict.fromkeys((PARAMETERS, GRADIENTS, MAIN), 0))
    for kind, held_here, by_rank in lots:
        parts.update(_of_kind(s, kind, held_here, by_rank[zero_rank]))
    reduction = parts.pop(REDUCTION)
    return {**parts, REDUCTION: reduction}


def _of_kind(s: Symbols, kind: ParamGroupKey, held_here: int, owned: int) -> Plan:
    shared, main, config = s.shares_parameters, wide(kind.dtype), s.config
    kept = main if shared else kind.dtype
    accumulated = main if shared or config.hybrid_zero_optimizer.fp32_grad_accum else kind.dtype
    reduced = torch_dtype(config.reduce_comm_dtype) if config.reduce_comm_dtype else accumulated
    copied = reduced != accumulated and (not shared or s.r.size > 1)
    in_buffer = owned if shared else held_here
    return {
        PARAMETERS: held_here * kept.itemsize,
        GRADIENTS: in_buffer * accumulated.itemsize + (accumulated != main) * owned * main.itemsize,
        MAIN: (kept != main) * owned * main.itemsize,
        **{state(name): owned * main.itemsize for name in UPDATE_RULES[kind.rule].states},
        REDUCTION: copied * in_buffer * reduced.itemsize,
    }


TOTAL = "all"


def format_worst_plan(config: Config, world_size: int) -> str:
    """The plan of the rank that holds the most, as a table under a heading; one line where there is no formula for the
    model."""
    try:
        plans = plans_of_stages(config, world_size)
    except KeyError:
        return f"Memory plan: there is no formula for the model {config.model_type!r}"
    totals = [sum(plan.values()) for plan in plans]
    stage = totals.index(max(totals))
    where = f", in stage {stage}" if len(plans) > 1 else ""
    return f"Memory plan of the rank that holds the most{where}, in MB\n{format_plans(plans[stage : stage + 1])}"


def format_plans(plans: Sequence[Plan], headings: Sequence[str] = ()) -> str:
    """A row for each part and their sum, a column of MB for each plan."""
    parts = list(dict.fromkeys(part for plan in plans for part in plan))
    rows = [(part, [plan.get(part, 0) for plan in plans]) for part in parts]
    rows.append((TOTAL, [sum(plan.values()) for plan in plans]))
    cells = [("", list(headings))] if headings else []
    cells += [(name, [in_mb(size) for size in sizes]) for name, sizes in rows]
    width = max(len(name) for name, _ in cells)
    columns = max(len(cell) for _, row in cells for cell in row)
    return "\n".join(f"{name:<{width}}  " + "  ".join(f"{cell:>{columns}}" for cell in row) for name, row in cells)
