"""The plan as a table."""

from __future__ import annotations

from collections.abc import Sequence

from internlm.config import Config
from internlm.profiler.memory import in_mb
from internlm.train.memory.plan import Plan, plans_of_stages

TOTAL = "all"


def told(config: Config, world_size: int) -> str:
    """The plan of the rank that holds the most, as a table under a heading; one line where there is no formula for the
    model."""
    try:
        plans = plans_of_stages(config, world_size)
    except KeyError:
        return f"Memory plan: there is no formula for the model {config.model_type!r}"
    totals = [sum(plan.values()) for plan in plans]
    stage = totals.index(max(totals))
    where = f", in stage {stage}" if len(plans) > 1 else ""
    return f"Memory plan of the rank that holds the most{where}, in MB\n{table(plans[stage : stage + 1])}"


def table(plans: Sequence[Plan], headings: Sequence[str] = ()) -> str:
    """A row for each part and their sum, a column of MB for each plan."""
    parts = list(dict.fromkeys(part for plan in plans for part in plan))
    rows = [(part, [plan.get(part, 0) for plan in plans]) for part in parts]
    rows.append((TOTAL, [sum(plan.values()) for plan in plans]))
    cells = [("", list(headings))] if headings else []
    cells += [(name, [in_mb(size) for size in sizes]) for name, sizes in rows]
    width = max(len(name) for name, _ in cells)
    columns = max(len(cell) for _, row in cells for cell in row)
    return "\n".join(f"{name:<{width}}  " + "  ".join(f"{cell:>{columns}}" for cell in row) for name, row in cells)
