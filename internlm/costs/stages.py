"""Which part of the model a stage of the pipeline builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from internlm.config import Config
from internlm.core.parallel.sharding import StageLayers
from internlm.core.scheduler.actions import BACKWARD, Table
from internlm.core.scheduler.stage_layout import StageLayout, balanced_partition, uniform_partition
from internlm.core.scheduler.table import read_table, schedule_of, stage_layout_of
from internlm.core.scheduler.validate import ScheduleError
from internlm.costs.flops import head_forward_flops, layer_forward_flops, layer_parameters, table_parameters
from internlm.utils.errors import Problem


class PartCosts(NamedTuple):
    """What a layer costs, and what comes to it at the ends of the model."""

    layer: float
    embedding: float
    head: float


def _parameters(config: Config) -> PartCosts:
    table = table_parameters(config.model)
    return PartCosts(layer_parameters(config.model), table, table)


def _flops(config: Config) -> PartCosts:
    seq_len = config.data.seq_len
    return PartCosts(layer_forward_flops(config.model, seq_len), 0.0, head_forward_flops(config.model))


COSTS: dict[str, Callable[[Config], PartCosts]] = {"parameters": _parameters, "flops": _flops}


def partition_of(config: Config) -> list[int]:
    """How many layers each virtual stage has, in the order of the model."""
    pipeline, layers = config.parallel.pipeline, config.model.num_layers
    parts = pipeline.size * config.model.num_chunks
    if not isinstance(pipeline.partition, str):
        return list(pipeline.partition)
    if pipeline.partition == "uniform":
        return uniform_partition(layers, parts)
    costs = COSTS[pipeline.partition](config)
    return balanced_partition([costs.layer] * layers, parts, costs.embedding, costs.head)


def stage_layout_of_config(config: Config) -> StageLayout:
    """How the config cuts the model."""
    pipeline, chunks = config.parallel.pipeline, config.model.num_chunks
    return stage_layout_of(schedule_of(pipeline.mode, chunks), pipeline.size, chunks)


def own_table(config: Config) -> Callable[[int], Table] | None:
    """What reads the user's own schedule for a number of micro-batches, if there is one; raises
    :class:`ScheduleError` for what is wrong with it."""
    path = config.parallel.pipeline.table
    return None if path is None else partial(_read_table, Path(path), stage_layout_of_config(config))


def _read_table(path: Path, cut: StageLayout, micro_batches: int) -> Table:
    try:
        table = read_table(path, cut.stages, cut.chunks, micro_batches)
    except ScheduleError as error:
        sizes = f"{cut.stages} stages with {cut.chunks} chunks, and data.micro_num = {micro_batches}"
        raise ScheduleError(*error.problems, Problem(str(path), f"was read for {sizes}")) from None
    if not any(action.type == BACKWARD for row in table.actions for action in row):
        raise ScheduleError(Problem(str(path), "has no B, so nothing would be learnt", "Add a B for every F"))
    if table.stage_layout != cut:
        what = f"is for a model cut {_told(table.stage_layout)}, but this one is cut {_told(cut)}"
        raise ScheduleError(Problem(str(path), what, "Change the line V in it, or parallel.pipeline.mode"))
    return table


def _told(cut: StageLayout) -> str:
    return "in a V" if cut.v_shaped else "in rounds"


def stage_layers_of(config: Config, stage: int) -> StageLayers:
    """The layers that ``stage`` holds, chunk by chunk."""
    cut, bounds = stage_layout_of_config(config), [0, *accumulate(partition_of(config))]
    virtual_stages = [cut.virtual(stage, chunk) for chunk in range(cut.chunks)]
    return StageLayers(config.model.num_layers, tuple(range(bounds[v], bounds[v + 1]) for v in virtual_stages))
