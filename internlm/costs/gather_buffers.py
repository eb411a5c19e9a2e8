"""Formulas of gather buffers: peak bytes of parameters that are gathered for use and then released.

Under isp a weight [O, I] is gathered whole, in w·⌈O/w⌉·I·e bytes. The settings of ``parallel.weight`` decide which
weights :class:`~internlm.core.parallel.weight_gatherer.WeightGatherer` holds at the same time. A block has the weights
wqkv, wo, w13 and w2; if wqkv is wq, wk and wv, or w13 is w1 and w3, each of these is a weight:

==============================  ======================================================================================
overlap=False                   one weight
overlap, forward, per "module"  two neighbouring weights
overlap, forward, per "layer"   all weights of the next block (or the head), and those of the current block from
                                ``launch_allgather_before`` on; the first block is not prefetched, so only one of
                                its weights is held at a time
overlap, backward               two neighbouring weights
overlap, recomputed block       first backward pass, before the order of recomputation is recorded: w2 and two
                                neighbours of the others; later passes: the first weights of this block and the next
==============================  ======================================================================================

With ``memory_pool``, the pool keeps as many buffers of each shape as were ever held at once. The embedding has a buffer
of its own, w·⌈V/w⌉·H·e, at a time when no other weight is held. Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import chain, pairwise
from operator import or_
from typing import TypeAlias

from internlm.core.parallel.weight_gatherer import LAUNCH_POSITIONS
from internlm.costs.flops import block_linears
from internlm.costs.param_shards import ParamInventory
from internlm.costs.symbols import Symbols, rows_per_rank
from internlm.costs.traffic import unit_sizes

#: Shape of a gathered weight, (rows, columns), padding included.
WeightShape: TypeAlias = tuple[int, int]
#: Shapes of weights that are held gathered at the same time.
HeldWeights: TypeAlias = Sequence[WeightShape]


def gather_buffers(inventory: ParamInventory) -> int:
    """Return the peak bytes of gathered parameters.

    If the zero group shards parameters, the root and the largest block are counted, U·e each, and the larger of these
    two a second time, because ``fully_shard`` receives a unit in one buffer and then copies the parameters out of it.
    Under isp, the table at the top of this file gives the weights that are held. Otherwise no parameters are gathered.

    Raises:
        NoCostFormulaError: The model is not the built-in decoder.
    """
    s = inventory.symbols
    if s.shares_parameters:
        sizes = unit_sizes(inventory)
        root, block = sizes.pop(""), max(sizes.values())
        return s.e * (root + block + max(root, block))
    if s.mode != "isp" or s.w.size == 1:
        return 0
    held = [Counter(weights) for chunk in s.chunks for weights in _held_in_chunk(s, chunk)]
    embedding = _nbytes(s, Counter([_gathered(s, s.V, s.H)])) if s.stage_layers.has_embedding else 0
    if s.config.parallel.weight.memory_pool:
        return _nbytes(s, reduce(or_, held)) + embedding  # union of counters: per shape, the maximum ever held
    return max(embedding, *(_nbytes(s, weights) for weights in held))


def _nbytes(s: Symbols, weights: Counter[WeightShape]) -> int:
    return s.e * sum(count * rows * columns for (rows, columns), count in weights.items())


def _gathered(s: Symbols, rows: int, columns: int) -> WeightShape:
    return s.w.size * rows_per_rank(rows, s.w), columns


def _held_in_chunk(s: Symbols, chunk: int) -> Iterator[HeldWeights]:
    """Yield each set of weights that is held at the same time in forward or backward of a chunk."""
    layers = s.stage_layers.chunks[chunk]
    linears = block_linears(s.config.model)
    block = [_gathered(s, linear.outputs, linear.inputs) for linear in linears]
    head = [[_gathered(s, s.V, s.H)]] if s.stage_layers.is_last(chunk) else []
    blocks, weight = [block] * len(layers), s.config.parallel.weight
    yield from ([shape] for shape in chain(*blocks, *head))
    if not weight.overlap:
        return
    if weight.forward_overlap_per == "module":
        yield from pairwise(chain(*blocks, *head))
    else:
        # Only the query/key/value projection is used before the attention kernel.
        position = abs(LAUNCH_POSITIONS[weight.launch_allgather_before])
        first_of_position = [index for index, linear in enumerate(linears) if not linear.shares_input]
        yield from _held_per_layer([*blocks, *head], first_of_position[position])
    yield from pairwise(chain(*blocks))
    # The last block runs backward first, so it is never recomputed while the prefetch of another block is in flight.
    if any(map(s.config.model.recomputes, layers[:-1])):
        yield from _held_recomputing(block)


def _held_per_layer(blocks: Sequence[HeldWeights], first: int) -> Iterator[HeldWeights]:
    """Yield each set of gathered weights that is held while forward prefetches a whole block.

    The prefetch starts at weight ``first`` of the current block, whose remaining weights are held at the same time.
    """
    for index, (block, following) in enumerate(pairwise(blocks)):
        rest = block[first:]
        # The first block is not prefetched, so it gathers and releases its weights one by one.
        yield from ([*held, *following] for held in ([rest] if index else [[weight] for weight in rest]))


def _held_recomputing(block: HeldWeights) -> Iterator[HeldWeights]:
    """Yield each set of weights that is held at the same time in backward of a recomputed block."""
    *others, last = block
    yield from ([last, *pair] for pair in pairwise(others))
    yield block[0], block[0]
