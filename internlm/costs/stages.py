"""Stage assignment: the layers that each pipeline stage builds, and the schedule of the stages.

The balance of stages by parameters or FLOPs uses the formulas of :mod:`internlm.costs.flops`, not an inventory: a model
is built from its stage assignment, so the assignment must not depend on a built model. For a user's own model the
balance is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Relative costs of each layer, of the embedding and of the head."""

    layers: Sequence[float]
    embedding: float
    head: float


def _by_parameters(config: Config) -> LayerCosts:
    vocab = vocab_weights(config.model)
    return LayerCosts([block_weights(config.model)] * config.model.num_layers, vocab, vocab)


def _by_flops(config: Config) -> LayerCosts:
    # An embedding lookup has no FLOPs, so the first stage gets more layers than the last.
    model, seq_len = config.model, config.data.seq_len
    layers = [block_forward_flops(model, seq_len, layer) for layer in range(model.num_layers)]
    return LayerCosts(layers, 0.0, head_forward_flops(model))


#: Cost functions by value of ``parallel.pipeline.partition``.
LAYER_COSTS: dict[str, Callable[[Config], LayerCosts]] = {"parameters": _by_parameters, "flops": _by_flops}


def partition_of(config: Config) -> list[int]:
    """Return the number of layers of each virtual stage, in model order."""
    pipeline, layers = config.parallel.pipeline, config.model.num_layers
    virtual_stages = pipeline.size * config.model.num_chunks
    if not isinstance(pipeline.partition, str):
        return list(pipeline.partition)
    if pipeline.partition == "uniform":
        return uniform_partition(layers, virtual_stages)
    costs = LAYER_COSTS[pipeline.partition](config)
    return balanced_partition(costs.layers, virtual_stages, costs.embedding, costs.head)


def stage_layout_of_config(config: Config) -> StageLayout:
    """Return the assignment of virtual stages to the ranks of the pipeline."""
    pipeline, chunks = config.parallel.pipeline, config.model.num_chunks
    return stage_layout_of(schedule_of(pipeline.mode, chunks), pipeline.size, chunks)


def stage_layers_of(config: Config, stage: int) -> StageLayers:
    """Return the layers that ``stage`` holds, chunk by chunk."""
    layout, bounds = stage_layout_of_config(config), [0, *accumulate(partition_of(config))]
    virtual_stages = [layout.virtual(stage, chunk) for chunk in range(layout.chunks)]
    return StageLayers(config.model.num_layers, tuple(range(bounds[v], bounds[v + 1]) for v in virtual_stages))


def table_of(config: Config) -> Table:
    """Return the action table of the pipeline for a training step.

    It is read from the user's own table (``parallel.pipeline.table``) if the config names one, else it is made for the
    schedule ``parallel.pipeline.mode``.

    Raises:
        ScheduleError: The user's own table is invalid, or does not match the config.
    """
    custom, pipeline, chunks = own_table(config), config.parallel.pipeline, config.model.num_chunks
    if custom is not None:
        return custom(config.data.micro_num)
    return make_table(schedule_of(pipeline.mode, chunks), pipeline.size, chunks, config.data.micro_num)


def own_table(config: Config) -> Callable[[int], Table] | None:
    """Return a function that reads the user's own action table; None if ``parallel.pipeline.table`` is not set.

    The function takes the number of micro-batches, and raises :class:`ScheduleError` if the file is invalid or does not
    match the config.
    """
    path = config.parallel.pipeline.table
    return None if path is None else partial(_read_table, Path(path), stage_layout_of_config(config))


def _read_table(path: Path, layout: StageLayout, micro_batches: int) -> Table:
    try:
        table = read_table(path, layout.stages, layout.chunks, micro_batches)
    except ScheduleError as error:
        sizes = f"parallel.pipeline.size = {layout.stages}, model.num_chunks = {layout.chunks}"
        message = f"expected an action table for {sizes} and data.micro_num = {micro_batches}"
        raise ScheduleError(*error.problems, Problem(str(path), message, "Change the file or these keys")) from None
    # A table with F only is valid, and evaluation uses one, but it cannot train.
    if not any(action.type == BACKWARD for row in table.actions for action in row):
        message = "has no backward action (B), so no gradient would be computed"
        raise ScheduleError(Problem(str(path), message, "Add a B for every F"))
    if table.stage_layout != layout:
        message = f"expected a {_shape(layout)} stage layout, as in the config, got a {_shape(table.stage_layout)} one"
        todo = f"{'Add' if layout.v_shaped else 'Remove'} the line V before the ranks, or change parallel.pipeline.mode"
        raise ScheduleError(Problem(str(path), message, todo))
    return table


def _shape(layout: StageLayout) -> str:
    return "V-shaped" if layout.v_shaped else "round-robin"
