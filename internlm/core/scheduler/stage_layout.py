"""Stage layout: assignment of virtual stages to ranks, and of layers to virtual stages.

A model is split into virtual stages 0 … S − 1, in the order of its layers. Each rank of a pipeline, a *stage*, holds
one or several virtual stages, its *chunks*: S = stages · chunks (Megatron's interleaving, arXiv 2104.04473, sec. 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import fsum, inf


@dataclass(frozen=True)
class StageLayout:
    """Assignment of virtual stages to the ranks of a pipeline.

    In the round-robin layout, chunk c of rank r is virtual stage c · stages + r. In the V-shaped layout, odd chunks are
    assigned in reverse, from the last rank to the first, so that with two chunks both ends of the model are on rank 0
    (arXiv 2405.15362).
    """

    stages: int
    chunks: int = 1
    v_shaped: bool = False

    @property
    def virtual_stages(self) -> int:
        """Number of virtual stages, S."""
        return self.stages * self.chunks

    def virtual(self, rank: int, chunk: int) -> int:
        """Return the virtual stage of chunk ``chunk`` on ``rank``."""
        backwards = self.v_shaped and chunk % 2
        return chunk * self.stages + (self.stages - 1 - rank if backwards else rank)

    def rank_of(self, virtual: int) -> int:
        """Return the rank that holds a virtual stage."""
        chunk, position = divmod(virtual, self.stages)
        return self.stages - 1 - position if self.v_shaped and chunk % 2 else position

    def chunk_of(self, virtual: int) -> int:
        """Return the index of a virtual stage among the chunks of its rank."""
        return virtual // self.stages


def uniform_partition(layers: int, virtual_stages: int) -> list[int]:
    """Split the layers as evenly as possible, and return the number of layers of each virtual stage.

    The virtual stages just before the last get the extra layers, one each, because the last also holds the head.
    """
    assert layers >= virtual_stages
    size, remainder = divmod(layers, virtual_stages)
    last = virtual_stages - 1
    return [size + (last - remainder <= stage < last) for stage in range(virtual_stages)]


def balanced_partition(costs: Sequence[float], virtual_stages: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Return layer counts, one for each virtual stage, that minimise the cost of the most expensive virtual stage.

    The result is optimal. Among the optimal partitions, one whose cheapest virtual stage costs the most is chosen;
    ties prefer fewer layers in the first virtual stages. Every virtual stage has at least one layer.

    Args:
        costs: Cost of each layer, such as its FLOPs or its number of parameters.
        virtual_stages: Number of virtual stages.
        first: Additional cost of the first virtual stage, for the embedding, in the unit of ``costs``.
        last: Additional cost of the last virtual stage, for the head, in the unit of ``costs``.
    """
    assert len(costs) >= virtual_stages

    def cost(stage: int, start: int, stop: int) -> float:
        extra = first * (stage == 0), last * (stage == virtual_stages - 1)
        # fsum rounds once, so that stages with the same layers in another order have the same cost.
        return fsum((*costs[start:stop], *extra))

    def capped(stage: int, start: int, stop: int) -> float:
        own = cost(stage, start, stop)
        return own if own <= largest else -inf

    largest, _ = _best_partition(len(costs), virtual_stages, cost, join=max, choose=min)
    return _best_partition(len(costs), virtual_stages, capped, join=min, choose=max)[1]


def _best_partition(
    layers: int,
    virtual_stages: int,
    value: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
    choose: Callable[[Iterable[float]], float],
) -> tuple[float, list[int]]:
    """Find the best partition by dynamic programming over (virtual stage, first layer).

    Args:
        layers: Number of layers.
        virtual_stages: Number of virtual stages.
        value: Function of (stage, start, stop): value of a virtual stage with layers start … stop − 1.
        join: Function that combines the values of two virtual stages.
        choose: Function that selects the best of several values.

    Returns:
        The value of the best partition, and the number of layers of each virtual stage.
    """

    @cache
    def rest(stage: int, start: int) -> tuple[float, int]:
        """Find the best assignment of the layers ≥ ``start`` to the virtual stages ≥ ``stage``.

        Returns:
            The value of this assignment, and the end (exclusive) of the layers that it assigns to ``stage``.
        """
        if stage == virtual_stages - 1:
            return value(stage, start, layers), layers
        stops = range(start + 1, layers - (virtual_stages - 1 - stage) + 1)
        values = [join(value(stage, start, stop), rest(stage + 1, stop)[0]) for stop in stops]
        best = choose(values)
        return best, stops[values.index(best)]

    sizes, start = [], 0
    for stage in range(virtual_stages):
        stop = rest(stage, start)[1]
        sizes.append(stop - start)
        start = stop
    return rest(0, 0)[0], sizes
