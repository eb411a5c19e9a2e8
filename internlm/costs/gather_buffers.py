"""Parameters that are gathered to be computed with, and given up after it: how many bytes of them there are at once.

The symbols are those of :mod:`internlm.costs.symbols`. Under isp a weight [O, I] is gathered whole:
w·⌈O/w⌉·I·e. Which of them :class:`~internlm.core.parallel.weight_gatherer.WeightGatherer` holds at the same time is
said by the settings of ``parallel.weight``; let the four of a block be called qkv, o, 13 and 2:

==============================  ======================================================================================
overlap=False                   one
overlap, forward, per "module"  two neighbours
overlap, forward, per "layer"   the whole next block (or the head) and, of the block before it, the weights from
                                ``launch_allgather_before`` on; of the first block, which nothing fetched ahead, one
overlap, backward               two neighbours
the same, a recomputed block    2, qkv and o, then 2, o and 13, as long as it is not known that the block is recomputed;
                                then qkv, and that of the block after it
==============================  ======================================================================================

The pool of ``memory_pool`` keeps of each shape as many as were ever held at once. The embedding, w·⌈V/w⌉·H·e, has a
buffer of its own, when nothing else is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import chain, pairwise
from operator import or_
from typing import TypeAlias

from internlm.core.parallel.weight_gatherer import LAUNCH_PLACES
from internlm.costs.symbols import Symbols
from internlm.costs.traffic import unit_sizes
from internlm.costs.traffic_model import block_linears, share

#: Rows and columns of a whole weight, padding included.
Shape: TypeAlias = tuple[int, int]
#: Weights that are held at once.
Moment: TypeAlias = Sequence[Shape]


def gather_buffers(s: Symbols) -> int:
    """Bytes of parameters that are gathered, at the most. Where the zero group shares them all: U·e of the root and of
    a block, and once more that of the larger of the two, for what is gathered comes as one piece and is then copied out
    (U as in :mod:`internlm.costs.traffic`)."""
    if s.shares_parameters:
        sizes = unit_sizes(s)
        root, block = sizes.pop(""), max(sizes.values())
        return s.e * (root + block + max(root, block))
    if s.mode != "isp" or s.w.size == 1:
        return 0
    moments = [Counter(moment) for chunk in s.chunks for moment in _of_chunk(s, chunk)]
    table = _bytes(s, Counter([_whole(s, s.V, s.H)])) if s.stage_layers.has_embedding else 0
    if s.config.parallel.weight.memory_pool:
        return _bytes(s, reduce(or_, moments)) + table
    return max(table, *(_bytes(s, moment) for moment in moments))


def _bytes(s: Symbols, weights: Counter[Shape]) -> int:
    return s.e * sum(count * rows * columns for (rows, columns), count in weights.items())


def _whole(s: Symbols, rows: int, columns: int) -> Shape:
    return s.w.size * share(rows, s.w), columns


def _of_chunk(s: Symbols, chunk: int) -> Iterator[Moment]:
    """What is held at once in the passes through a chunk."""
    layers = s.stage_layers.chunks[chunk]
    block = [_whole(s, each.outputs, each.inputs) for each in block_linears(s)]
    head = [[_whole(s, s.V, s.H)]] if s.stage_layers.is_last(chunk) else []
    blocks, weight = [block] * len(layers), s.config.parallel.weight
    yield from ([each] for each in chain(*blocks, *head))
    if not weight.overlap:
        return
    if weight.forward_overlap_per == "module":
        yield from pairwise(chain(*blocks, *head))
    else:
        yield from _layer_by_layer([*blocks, *head], LAUNCH_PLACES[weight.launch_allgather_before])
    yield from pairwise(chain(*blocks))
    if any(map(s.config.model.recomputes, layers[:-1])):  # and another block goes backward before it
        yield from _recomputed(block)


def _layer_by_layer(blocks: Sequence[Moment], launch_place: int) -> Iterator[Moment]:
    first = launch_place if launch_place >= 0 else 1  # the kernel of attention comes after one weight
    for number, (here, following) in enumerate(pairwise(blocks)):
        rest = here[first:]
        yield from ([*held, *following] for held in ([rest] if number else [[each] for each in rest]))


def _recomputed(block: Moment) -> Iterator[Moment]:
    *others, last = block
    yield from ([last, *pair] for pair in pairwise(others))
    yield block[0], block[0]
