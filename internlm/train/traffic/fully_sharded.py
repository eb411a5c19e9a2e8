"""What is sent where the zero group shares parameters and gradients (``parallel.zero1.fsdp``).

The symbols are those of :mod:`internlm.train.traffic.symbols`; besides, a unit is a block, or, the root, all that lies
outside of blocks. Of U elements of a unit every parameter is padded: from R rows to z⌈R/z⌉.
"""

from __future__ import annotations

from collections.abc import Iterable

from internlm.core.parallel.attach import block_of
from internlm.core.parallel.sharding import Share
from internlm.ops.precision import wide
from internlm.solver.optimizer.kinds import Kind
from internlm.train.traffic.calls import AG, AR, RS, Call, Passes, calls_of
from internlm.train.traffic.model import share
from internlm.train.traffic.parameters import Parameter, group_of_partial, kinds, parameters, reduced_size
from internlm.train.traffic.symbols import Symbols
from internlm.utils.dtype import torch_dtype


def units(s: Symbols) -> Passes:
    """All units in one micro-batch; c: bytes of an element as it is reduced.

    ========  =========================  =========================================================
    unit      forward                    backward
    ========  =========================  =========================================================
    a block   all-gather over z of U·e   all-gather over z of U·e; reduce-scatter over z of U·c
    the root  all-gather over z of U·e   reduce-scatter over z of U·c
    ========  =========================  =========================================================
    """
    sizes, reduced = unit_sizes(s), reduced_size(s, torch_dtype(str(s.config.model.dtype)))
    forward = [call for size in sizes.values() for call in calls_of(s.z, AG, size * s.e)]
    again = [call for block, size in sizes.items() if block for call in calls_of(s.z, AG, size * s.e)]
    reduce = [call for size in sizes.values() for call in calls_of(s.z, RS, size * reduced)]
    return Passes(forward, again + reduce)


def unit_sizes(s: Symbols) -> dict[str, int]:
    """U of each block by its name, and of the root, whose name is empty."""
    sizes: dict[str, int] = {}
    for each in parameters(s):
        block = block_of(each.name) if each.name.startswith("layers.") else ""
        sizes[block] = sizes.get(block, 0) + s.z.size * share(each.rows, s.z) * each.width
    return sizes


def sums(s: Symbols, zero_rank: int) -> list[Call]:
    """What is left of the sums: for each kind, of which this rank has N elements, all-reduce over r of N·c, c being
    bytes of an element of a gradient, or of ``reduce_comm_dtype``; where every rank has a part of the sum, all-reduce
    of N·g over t."""
    return [call for kind, members in kinds(s).items() for call in _sums(s, kind, members, zero_rank)]


def _sums(s: Symbols, kind: Kind, members: Iterable[Parameter], zero_rank: int) -> list[Call]:
    count, reduced = sum(held(each, Share(zero_rank, s.z.size)) for each in members), s.config.reduce_comm_dtype
    if not count:
        return []
    size = wide(kind.dtype).itemsize
    calls = calls_of(s.r, AR, count * (torch_dtype(reduced).itemsize if reduced else size))
    if kind.partial_over is not None:
        calls += calls_of(group_of_partial(s, kind.partial_over), AR, count * size)
    return calls


def held(parameter: Parameter, place: Share) -> int:
    """Elements of a parameter that a rank holds."""
    rows = -(-parameter.rows // place.size)
    return max(min(rows, parameter.rows - place.rank * rows), 0) * parameter.width
