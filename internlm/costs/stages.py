"""Stage assignment: which layers each stage of the pipeline builds, and the schedule it runs.

The balance of stages by parameters or FLOPs uses the formulas of :mod:`internlm.costs.flops`, not an inventory: a model
is built from its stage assignment, so the assignment cannot wait for a built model. For a model of a user's own they
are an estimate.
"""

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
from internlm.core.scheduler.table import make_table, read_table, schedule_of, stage_layout_of
from internlm.core.scheduler.validate import ScheduleError
from internlm.costs.flops import block_forward_flops, block_weights, head_forward_flops, vocab_weights
from internlm.utils.errors import Problem


class LayerCosts(NamedTuple):
    """Relative cost of a layer, and what embedding and head add at the two ends of the model."""

    layer: float
    embedding: float
    head: float


def _by_parameters(config: Config) -> LayerCosts:
    vocab = vocab_weights(config.model)
    return LayerCosts(block_weights(config.model), vocab, vocab)


def _by_flops(config: Config) -> LayerCosts:
    # Looking up an embedding multiplies nothing, so the first stage gets more layers than the last.
    return LayerCosts(block_forward_flops(config.model, config.data.seq_len), 0.0, head_forward_flops(config.model))


#: Cost functions by value of ``parallel.pipeline.partition``.
LAYER_COSTS: dict[str, Callable[[Config], LayerCosts]] = {"parameters": _by_parameters, "flops": _by_flops}


def partition_of(config: Config) -> list[int]:
    """Return the number of layers of each virtual stage, in the order of the model."""
    pipeline, layers = config.parallel.pipeline, config.model.num_layers
    virtual_stages = pipeline.size * config.model.num_chunks
    if not isinstance(pipeline.partition, str):
        return list(pipeline.partition)
    if pipeline.partition == "uniform":
        return uniform_partition(layers, virtual_stages)
    costs = LAYER_COSTS[pipeline.partition](config)
    return balanced_partition([costs.layer] * layers, virtual_stages, costs.embedding, costs.head)


def stage_layout_of_config(config: Config) -> StageLayout:
    """Return which rank of the pipeline holds which virtual stage."""
    pipeline, chunks = config.parallel.pipeline, config.model.num_chunks
    return stage_layout_of(schedule_of(pipeline.mode, chunks), pipeline.size, chunks)


def stage_layers_of(config: Config, stage: int) -> StageLayers:
    """Return the layers that ``stage`` holds, chunk by chunk."""
    layout, bounds = stage_layout_of_config(config), [0, *accumulate(partition_of(config))]
    virtual_stages = [layout.virtual(stage, chunk) for chunk in range(layout.chunks)]
    return StageLayers(config.model.num_layers, tuple(range(bounds[v], bounds[v + 1]) for v in virtual_stages))


def table_of(config: Config) -> Table:
    """Return the schedule of a step; raises :class:`ScheduleError` where the user's own table is faulty."""
    custom, pipeline, chunks = own_table(config), config.parallel.pipeline, config.model.num_chunks
    if custom is not None:
        return custom(config.data.micro_num)
    return make_table(schedule_of(pipeline.mode, chunks), pipeline.size, chunks, config.data.micro_num)


def own_table(config: Config) -> Callable[[int], Table] | None:
    """Return a reader of the user's own schedule, which takes the number of micro-batches; None without one.

    The reader raises :class:`ScheduleError` for what is wrong with the file.
    """
    path = config.parallel.pipeline.table
    return None if path is None else partial(_read_table, Path(path), stage_layout_of_config(config))


def _read_table(path: Path, layout: StageLayout, micro_batches: int) -> Table:
    try:
        table = read_table(path, layout.stages, layout.chunks, micro_batches)
    except ScheduleError as error:
        sizes = f"{layout.stages} stages with {layout.chunks} chunks, and data.micro_num = {micro_batches}"
        raise ScheduleError(*error.problems, Problem(str(path), f"was read for {sizes}")) from None
    # A table of forward passes alone is valid, and evaluation uses such tables, but it cannot train.
    if not any(action.type == BACKWARD for row in table.actions for action in row):
        raise ScheduleError(Problem(str(path), "has no B, so nothing would be learnt", "Add a B for every F"))
    if table.stage_layout != layout:
        message = f"is for a model cut {_shape(table.stage_layout)}, but this one is cut {_shape(layout)}"
        raise ScheduleError(Problem(str(path), message, "Change the line V in it, or parallel.pipeline.mode"))
    return table


def _shape(layout: StageLayout) -> str:
    return "in a V" if layout.v_shaped else "in rounds"
