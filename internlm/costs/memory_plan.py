"""Memory plan: peak bytes that a rank will hold, row by row, computed before a run starts.

The measurements of ``internlm.profiler`` have rows of the same names, so that plan and measurement can be compared.
Mixed precision keeps fp32 main parameters and states (Micikevicius et al. 2018, arXiv 1710.03740), which ZeRO shards
over the zero group (Rajbhandari et al. 2020, arXiv 1910.02054, section 3). Symbols: :mod:`internlm.costs.symbols`; here
e and g differ between param groups, because ``use_fp32_norm`` gives norms another dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from internlm.accelerator import HOST, kind_of
from internlm.costs.activations import peak_saved
from internlm.costs.device_buffers import nccl_buffers, transients
from internlm.costs.gather_buffers import gather_buffers
from internlm.costs.param_shards import ParamInventory
from internlm.solver.optimizer.param_groups import ParamGroupKey
from internlm.solver.optimizer.zero_optimizer import UPDATE_RULES
from internlm.utils.dtype import torch_dtype, wide

PARAMETERS = "parameters"
GRADIENTS = "gradients"
MAIN = "main parameters"
REDUCTION = "reduction buffers"
GATHER = "gather buffers"
ACTIVATIONS = "activations"
TRANSIENTS = "transients"
NCCL = "buffers of NCCL"
TOTAL = "total"


def optimizer_row(state: str) -> str:
    """Return the name of the memory plan's row for an optimizer state: ``optimizer: exp_avg`` for ``exp_avg``."""
    return f"optimizer: {state}"


#: Bytes by row.
Plan: TypeAlias = dict[str, int]


def memory_plan(
    inventory: ParamInventory,
    *,
    zero_rank: int | None = None,
    tokens: int | None = None,
    device_type: str = HOST.type,
) -> Plan:
    """Return the memory plan of a rank in the inventory's pipeline stage, as bytes by row.

    ====================  =====================================================================================
    parameters            N·e
    gradients             N·a, plus n·g for the reduced gradients if they have another dtype
    main parameters       n·g, if they have another dtype than the parameters
    optimizer: (a state)  n·g, for param groups whose update rule keeps this state
    reduction buffers     N·c, if gradients are accumulated in another dtype: all buckets may be in flight
    gather buffers        :func:`~internlm.costs.gather_buffers.gather_buffers`
    activations           :func:`~internlm.costs.activations.peak_saved`
    transients            :func:`~internlm.costs.device_buffers.transients`, on an accelerator only
    buffers of NCCL       :func:`~internlm.costs.device_buffers.nccl_buffers`, on an accelerator that uses NCCL
    ====================  =====================================================================================

    If the zero group shards parameters (``zero1.fsdp``), no rank has a flat buffer of the whole group. Parameters then
    take g bytes per element of this rank's shards, with rows padded to equal shards. Gradients take n·g, and reduction
    buffers n·c if there are replicas.

    Args:
        inventory: Parameters of the stage. For a model other than the built-in decoder, gather buffers and activations
            have no formula, and their rows are left out.
        zero_rank: Rank within the zero group; by default the rank that holds the most bytes.
        tokens: Number of tokens of a micro-batch that take part in the loss; by default all.
        device_type: Type of the device. On the CPU, transients count as memory of the process.
    """
    ranks = _ranks_with_most(inventory) if zero_rank is None else [zero_rank]
    groups = _group_numels(inventory, ranks)
    # Ranks that own equally many elements of each param group have equal plans: one plan is enough for all of them.
    shares = dict.fromkeys(zip(*(group.owned for group in groups), strict=True)) or {(): None}
    by_share = [_model_and_optimizer(inventory, groups, share) for share in shares]
    plan = max(by_share, key=lambda rows: sum(rows.values()))
    if inventory.spec is not None:
        plan[GATHER] = gather_buffers(inventory)
        plan[ACTIVATIONS] = peak_saved(
            inventory.config, inventory.world_size, tokens, stage=inventory.stage, device_type=device_type
        )
    kind = kind_of(device_type)
    if inventory.spec is not None and not kind.is_host:
        plan[TRANSIENTS] = transients(
            inventory.config, inventory.world_size, tokens, stage=inventory.stage, device_type=device_type
        )
    if kind.backend == "nccl":
        plan[NCCL] = nccl_buffers(inventory.config, inventory.world_size, inventory.stage)
    return plan


def _ranks_with_most(inventory: ParamInventory) -> Sequence[int]:
    """Return the ranks of the zero group among which is the one that holds the most bytes."""
    # fully_shard gives the first rank at least as many rows of each parameter as any other rank.
    return range(1 if inventory.groups.shares_parameters else inventory.groups.z.size)


class GroupNumel(NamedTuple):
    """Numbers of elements of a param group: allocated on every rank, and owned by each of several ranks."""

    key: ParamGroupKey
    allocated: int
    owned: Sequence[int]


def _group_numels(inventory: ParamInventory, ranks: Sequence[int]) -> list[GroupNumel]:
    """Return the numbers of elements of each param group; ``ranks`` are those of the zero group that are wanted."""
    zero = inventory.groups.z
    if not inventory.groups.shares_parameters:
        layouts = [(key, buffer.layout) for key, buffer in inventory.flat_buffers.items()]
        return [GroupNumel(key, layout.numel, [layout.owned(rank) for rank in ranks]) for key, layout in layouts]
    return [
        GroupNumel(
            key,
            sum(shard.numel_per_rank(zero) for shard in shards),
            [sum(shard.owned_numel(zero, rank) for shard in shards) for rank in ranks],
        )
        for key, shards in inventory.param_groups.items()
    ]


def _model_and_optimizer(inventory: ParamInventory, groups: Iterable[GroupNumel], share: Sequence[int]) -> Plan:
    """Return the rows of the memory plan for parameters, gradients and optimizer states on one rank.

    ``share`` is the number of elements that the rank owns of each param group.
    """
    rows = Counter(dict.fromkeys((PARAMETERS, GRADIENTS, MAIN), 0))
    for group, owned in zip(groups, share, strict=True):
        rows.update(_group_rows(inventory, group.key, group.allocated, owned))
    zero, sharded = inventory.groups.z, inventory.groups.shares_parameters
    for shard in inventory.shards:
        if not shard.trainable:  # frozen: no flat buffer, no gradient, no optimizer state
            kept = wide(shard.dtype) if sharded else shard.dtype
            rows[PARAMETERS] += kept.itemsize * (shard.numel_per_rank(zero) if sharded else shard.numel)
    rows[REDUCTION] = rows.pop(REDUCTION, 0)  # the last row, after the states of every update rule
    return dict(rows)


def _group_rows(inventory: ParamInventory, key: ParamGroupKey, allocated: int, owned: int) -> Plan:
    """Return the rows of the memory plan for one param group, of which a rank owns ``owned`` elements."""
    sharded, main = inventory.groups.shares_parameters, wide(key.dtype)
    # fully_shard rounds to half precision when it gathers, so the sharded parameters are the main parameters.
    parameter = main if sharded else key.dtype
    gradient = main if sharded or inventory.config.hybrid_zero_optimizer.fp32_grad_accum else key.dtype
    reduce_dtype = inventory.config.reduce_comm_dtype
    reduced = torch_dtype(reduce_dtype) if reduce_dtype else gradient
    # A reduction in another dtype needs a copy of the buffer; in the same dtype it runs in place. fully_shard reduces
    # unit by unit in its own buffers, so only the sums over replicas need a copy.
    copied = reduced != gradient and (not sharded or inventory.groups.r.size > 1)
    buffer = owned if sharded else allocated
    return {
        PARAMETERS: allocated * parameter.itemsize,
        GRADIENTS: buffer * gradient.itemsize + (gradient != main) * owned * main.itemsize,
        MAIN: (parameter != main) * owned * main.itemsize,
        **{optimizer_row(state): owned * main.itemsize for state in UPDATE_RULES[key.rule].states},
        REDUCTION: copied * buffer * reduced.itemsize,
    }


# -- format


def format_plans(plans: Sequence[Plan], headings: Sequence[str] = (), device_memory: int | None = None) -> str:
    """Format plans as a table: a column per plan, a line per row, and a line with the totals.

    Args:
        plans: Plans of several ranks.
        headings: Headings of the columns; by default none.
        device_memory: Device memory in bytes. If given, a further line has the totals as percentages of it.
    """
    names = list(dict.fromkeys(row for plan in plans for row in plan))
    totals = [sum(plan.values()) for plan in plans]
    cells = [("", list(headings))] if headings else []
    cells += [(name, [format_bytes(plan.get(name, 0)) for plan in plans]) for name in names]
    cells.append((TOTAL, [format_bytes(total) for total in totals]))
    if device_memory:
        cells.append((f"of {format_bytes(device_memory)}", [f"{total / device_memory:.1%}" for total in totals]))
    width = max(len(name) for name, _ in cells)
    column = max(len(cell) for _, row in cells for cell in row)
    lines = [f"{name:<{width}}  " + "  ".join(f"{cell:>{column}}" for cell in row) for name, row in cells]
    if any(ACTIVATIONS not in plan for plan in plans):
        lines.append("Not included: activations and gather buffers, which have no formula for this model")
    return "\n".join(lines)


def format_worst_plan(plans: Mapping[int, Plan], device_memory: int | None = None) -> str:
    """Format the plan of the stage that holds the most bytes, with a heading.

    Args:
        plans: Plans by pipeline stage.
        device_memory: Device memory in bytes; see :func:`format_plans`.
    """
    stage = max(plans, key=lambda index: sum(plans[index].values()))
    where = f", in stage {stage}" if len(plans) > 1 else ""
    return f"Memory plan of the rank that holds the most{where}\n{format_plans([plans[stage]], (), device_memory)}"


def format_bytes(size: int | None) -> str:
    """Format bytes as GiB, or below one GiB as MiB; None is formatted as a dash."""
    if size is None:
        return "-"
    if size == 0:
        return "0"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
