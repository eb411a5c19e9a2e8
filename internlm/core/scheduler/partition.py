"""How many of the model's layers each virtual stage gets, in their order. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import fsum, inf


def uniform(layers: int, parts: int) -> list[int]:
    """As even as can be: what is over goes, one each, to the parts from the last but one backwards, since the last has
    the head as well."""
    assert layers >= parts
    each, over = divmod(layers, parts)
    return [each + (parts - 1 - over <= part < parts - 1) for part in range(parts)]


def balanced(costs: Sequence[float], parts: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Make the largest part as small as can be, exactly; among such cuts, make the smallest part as large as can be.

    ``costs`` are those of the layers; the first and the last part cost ``first`` and ``last`` more, for the embedding
    and the head. Every part gets a layer at least. Ties are broken toward fewer layers in front.
    """
    assert len(costs) >= parts

    def cost(part: int, start: int, stop: int) -> float:
        extra = first * (part == 0), last * (part == parts - 1)
        return fsum((*costs[start:stop], *extra))  # rounded once, so that parts of equal layers are equal

    def capped(part: int, start: int, stop: int) -> float:
        own = cost(part, start, stop)
        return own if own <= largest else -inf

    largest, _ = _best_cut(len(costs), parts, cost, join=max, choose=min)
    return _best_cut(len(costs), parts, capped, join=min, choose=max)[1]


def _best_cut(
    layers: int,
    parts: int,
    value: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
    choose: Callable[[Iterable[float]], float],
) -> tuple[float, list[int]]:
    """The best value of a cut and its sizes, by dynamic programming over (part, its first layer).

    A part of layers start … stop − 1 is worth ``value(part, start, stop)``, a cut what ``join`` makes of its parts'
    values, and ``choose`` takes the best of several.
    """

    @cache
    def rest(part: int, start: int) -> tuple[float, int]:
        """The best value of the parts from ``part`` on, which begins at ``start``, and where it stops."""
        if part == parts - 1:
            return value(part, start, layers), layers
        stops = range(start + 1, layers - (parts - 1 - part) + 1)
        values = [join(value(part, start, stop), rest(part + 1, stop)[0]) for stop in stops]
        best = choose(values)
        return best, stops[values.index(best)]

    sizes, start = [], 0
    for part in range(parts):
        stop = rest(part, start)[1]
        sizes.append(stop - start)
        start = stop
    return rest(0, 0)[0], sizes
