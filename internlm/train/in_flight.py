"""What a stage of a pipeline keeps of all micro-batches and chunks that are in flight, from the config alone.

A pair of micro-batch and chunk is in flight from its F to its last action: W, or B where the schedule puts no weights
off. From F to B it keeps what :func:`~internlm.train.activations.saved_for_backward` tells, from B to W what
:func:`~internlm.train.activations.kept_for_weights` tells. A rank does one thing at a time, so the order of its actions
alone says what it keeps.
"""

from __future__ import annotations

from internlm.config import Config
from internlm.core.scheduler.actions import BACKWARD, FORWARD, Table
from internlm.core.scheduler.table import kind_of, make_table
from internlm.train.activations import kept_for_weights, saved_for_backward
from internlm.train.stages import own_table


def peak_saved(config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0) -> int:
    """Bytes that a rank of ``stage`` keeps at the most between two actions of its schedule.

    Within an action it may have more: gradients of activations, and what a block that is recomputed would have kept.
    Arguments as those of :func:`~internlm.train.activations.saved_for_backward`.
    """
    return max(kept_after_each_action(config, world_size, tokens, stage=stage))


def kept_after_each_action(config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0) -> list[int]:
    """The same after each of its actions."""
    table = table_of(config)
    chunks = range(table.cut.chunks)
    saved = [sum(saved_for_backward(config, world_size, tokens, stage=stage, chunk=each).values()) for each in chunks]
    put_off = [sum(kept_for_weights(config, world_size, stage=stage, chunk=each).values()) for each in chunks]
    kept: dict[tuple[int, int], int] = {}
    sums = []
    for action in table.actions[stage]:
        pair = action.chunk, action.micro_batch
        if action.kind == FORWARD:
            kept[pair] = saved[action.chunk]
        elif action.kind == BACKWARD and table.defers_weight(stage, action):
            kept[pair] = put_off[action.chunk]
        else:
            del kept[pair]
        sums.append(sum(kept.values()))
    return sums


def table_of(config: Config) -> Table:
    """The schedule of a step; raises :class:`~internlm.core.scheduler.validate.ScheduleError` where there is none."""
    own, pipeline, chunks = own_table(config), config.parallel.pipeline, config.model.num_chunks
    if own is not None:
        return own(config.data.micro_num)
    return make_table(kind_of(pipeline.mode, chunks), pipeline.size, chunks, config.data.micro_num)
