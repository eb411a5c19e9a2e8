"""What is sent where the zero group shares parameters and gradients (``parallel.zero1.fsdp``).

The symbols are those of :mod:`internlm.costs.symbols`; besides, a unit is a block, or, the root, all that lies
outside of blocks. Of U elements of a unit every parameter is padded: from R rows to z⌈R/z⌉.

What the optimizer sends: of flat buffers, and the norm.

What a step sends: scalars, micro-batches, optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from internlm.config import Config
from internlm.core.parallel.ledger import Traffic
from internlm.core.parallel.sharding import GroupPosition
from internlm.costs.parameters import Buffer, Parameter, buffers, group_of_partial, kinds, parameters, reduced_size
from internlm.costs.symbols import Symbols
from internlm.costs.traffic_model import (
    AG,
    AR,
    BROADCAST,
    REDUCE,
    RS,
    SEND,
    Call,
    Passes,
    block,
    calls_of,
    count_calls,
    embedding,
    head,
    loss,
    positions,
    share,
    to_tokens,
    together,
)
from internlm.solver.optimizer.flat_buffers import Bucket
from internlm.solver.optimizer.param_groups import ParamGroupKey
from internlm.utils.dtype import torch_dtype, wide


def fsdp_units(s: Symbols) -> Passes:
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
        block = ".".join(each.name.split(".")[:2]) if each.name.startswith("layers.") else ""
        sizes[block] = sizes.get(block, 0) + s.z.size * share(each.rows, s.z) * each.width
    return sizes


def fsdp_sums(s: Symbols, zero_rank: int) -> list[Call]:
    """What is left of the sums: for each kind, of which this rank has N elements, all-reduce over r of N·c, c being
    bytes of an element of a gradient, or of ``reduce_comm_dtype``; where every rank has a part of the sum, all-reduce
    of N·g over t."""
    return [call for kind, members in kinds(s).items() for call in _fsdp_sums(s, kind, members, zero_rank)]


def _fsdp_sums(s: Symbols, kind: ParamGroupKey, members: Iterable[Parameter], zero_rank: int) -> list[Call]:
    count = sum(held_elements(each, GroupPosition(zero_rank, s.z.size)) for each in members)
    reduced = s.config.reduce_comm_dtype
    if not count:
        return []
    size = wide(kind.dtype).itemsize
    calls = calls_of(s.r, AR, count * (torch_dtype(reduced).itemsize if reduced else size))
    if kind.partial_over is not None:
        calls += calls_of(group_of_partial(s, kind.partial_over), AR, count * size)
    return calls


def held_elements(parameter: Parameter, place: GroupPosition) -> int:
    """Elements of a parameter that a rank holds."""
    rows = -(-parameter.rows // place.size)
    return max(min(rows, parameter.rows - place.rank * rows), 0) * parameter.width


def optimizer(s: Symbols, zero_rank: int = 0) -> list[Call]:
    """Every bucket of B elements, padding included, of the flat buffer of each kind: its gradients, then the norm, then
    its parameters. c: bytes of an element as it is reduced.

    1. reduce-scatter over z of B·c; all-reduce over r of (B/z)·c; where every rank has a part of the sum (vectors under
       msp and fsp: over t, under isp: over w) all-reduce of (B/z)·g; the same over the first and the last stage of the
       pipeline, where both hold a tied embedding
    2. all-reduce over z of 16; over the group by which weights are split, of 8; over p of 8
    3. Muon: all-gather over that group of each matrix that this rank of z owns, O·I·g
    4. all-gather over z of B·e

    Buckets that are shared by parameter are reduced owner by owner, and broadcast so: of the N elements of each, N·c
    from those that don't own them, N·e from the one that does. In 1 B/z is what this rank owns.

    There are no buckets where parameters are shared (:mod:`~internlm.costs.traffic`).
    """
    calls = calls_of(s.z, AR, 16) + calls_of(s.split, AR, 8) + calls_of(s.p, AR, 8)
    if s.shares_parameters:
        return calls + fsdp_sums(s, zero_rank)
    for kind, buffer in buffers(s).items():
        for bucket in buffer.layout.buckets:
            calls += _bucket(s, kind, bucket, zero_rank)
        calls += _matrices(s, kind, buffer, zero_rank)
    return calls


def _bucket(s: Symbols, kind: ParamGroupKey, bucket: Bucket, zero_rank: int) -> list[Call]:
    sent, wide_size = reduced_size(s, kind.dtype), wide(kind.dtype).itemsize
    run = bucket.run(zero_rank)
    own = run.stop - run.start
    calls = calls_of(s.r, AR, own * sent) if own else []
    if kind.partial_over is not None and own:
        calls += calls_of(group_of_partial(s, kind.partial_over), AR, own * wide_size)
    if bucket.is_even:
        elements = bucket.last - bucket.first
        return [*calls, *calls_of(s.z, RS, elements * sent), *calls_of(s.z, AG, elements * kind.dtype.itemsize)]
    return calls + [call for owner in range(s.z.size) for call in _owned(s, kind, bucket, owner, zero_rank)]


def _owned(s: Symbols, kind: ParamGroupKey, bucket: Bucket, owner: int, zero_rank: int) -> list[Call]:
    """Of what one rank owns of a bucket."""
    run = bucket.run(owner)
    elements = run.stop - run.start
    if not elements:
        return []
    grads, values = elements * reduced_size(s, kind.dtype), elements * kind.dtype.itemsize
    return [
        Call(s.z.mode, REDUCE, 0 if owner == zero_rank else grads),
        Call(s.z.mode, BROADCAST, values if owner == zero_rank else 0),
    ]


def _matrices(s: Symbols, kind: ParamGroupKey, buffer: Buffer, zero_rank: int) -> list[Call]:
    if not kind.needs_matrices or kind.split_over is None:
        return []
    size = wide(kind.dtype).itemsize
    owned = [s.split.size * each.elements * size for each in buffer.owned(zero_rank)]
    return [call for whole in owned for call in calls_of(s.split, AG, whole)]


def expected_traffic(
    config: Config,
    world_size: int,
    tokens: Sequence[int] | None = None,
    *,
    types: int = 1,
    device_type: str = "cpu",
    forward_only: bool = False,
    stage: int = 0,
    zero_rank: int = 0,
) -> Traffic:
    """What the ledger of each rank of pipeline stage ``stage`` must hold after one training step of a decoder of ours:
    scalars, micro-batches, optimizer. With ``forward_only``, after one validation step. ``zero_rank``: its place among
    those that share the optimizer's state, which matters where they do so by whole parameters.

    ``tokens``: of each micro-batch of this rank, how many take part in the loss: on the CPU those whose label is not
    ignored, elsewhere all. Without it, all of ``micro_num`` micro-batches. ``types``: number of data-set types.

    ``config`` is resolved; the step is none that is skipped for its gradient norm. Raises KeyError for a model that is
    not ours.
    """
    s = Symbols.of(config, world_size, stage)
    calls = scalars(s, types)
    for count in tokens if tokens is not None else [s.T] * config.data.micro_num:
        passes = micro_batch(s, count, device_type)
        calls += passes.forward if forward_only else passes.forward + passes.backward
    return count_calls(calls if forward_only else calls + optimizer(s, zero_rank))


def scalars(s: Symbols, types: int) -> list[Call]:
    """All-reduces of a step: over d the number of valid tokens, 8; over d, then over p, loss, hits and tokens by type,
    3·types·8."""
    sums = 3 * types * 8
    return calls_of(s.d, AR, 8) + calls_of(s.d, AR, sums) + calls_of(s.p, AR, sums)


def micro_batch(s: Symbols, tokens: int, device_type: str) -> Passes:
    """One micro-batch, of which so many tokens take part in the loss: all chunks of the stage, and the parameters that
    are shared."""
    shared = [fsdp_units(s)] if s.shares_parameters else []
    return together(*shared, *(chunk(s, number, tokens, device_type) for number in s.chunks))


def chunk(s: Symbols, number: int, tokens: int, device_type: str) -> Passes:
    """A chunk: positions, blocks, what it sends to others; the first also the embedding, the last head and loss.
    Backward runs blocks that are recomputed forward once more, the last product and all that is sent by it included;
    where attention alone is recomputed, it sends heads to tokens once more. Where gradients of weights are put off, the
    same is sent later."""
    layers, each = len(s.stage_layers.chunks[number]), block(s)
    again = each.forward * s.recomputed(number)
    if s.spec.recomputes_attention:
        again = to_tokens(s).forward * layers
    blocks = Passes(each.forward * layers, each.backward * layers + again)
    parts = [positions(s), blocks, sends(s, number)]
    if s.stage_layers.is_first(number):
        parts.append(embedding(s))
    if s.stage_layers.is_last(number):
        parts += head(s), Passes(loss(s, tokens, device_type), [])
    return together(*parts)


def sends(s: Symbols, number: int) -> Passes:
    """S·H·e: hidden units to the chunk after, their gradient to the one before, unless that is on the same rank."""

    def to(virtual: int) -> list[Call]:
        goes = 0 <= virtual < s.stage_layout.virtual_stages and s.stage_layout.rank_of(virtual) != s.stage
        return [Call(s.p.mode, SEND, s.S * s.H * s.e)] if goes else []

    here = s.stage_layout.virtual(s.stage, number)
    return Passes(to(here + 1), to(here - 1))
