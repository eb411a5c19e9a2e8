"""What the optimizer sends: of flat buffers, and the norm."""

from __future__ import annotations

from internlm.ops.precision import wide
from internlm.solver.optimizer.buckets import Bucket
from internlm.solver.optimizer.kinds import Kind
from internlm.train.traffic import fully_sharded
from internlm.train.traffic.calls import AG, AR, BROADCAST, REDUCE, RS, Call, calls_of
from internlm.train.traffic.parameters import Buffer, buffers, group_of_partial, reduced_size
from internlm.train.traffic.symbols import Symbols


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

    There are no buckets where parameters are shared (:mod:`~internlm.train.traffic.fully_sharded`).
    """
    calls = calls_of(s.z, AR, 16) + calls_of(s.split, AR, 8) + calls_of(s.p, AR, 8)
    if s.shares_parameters:
        return calls + fully_sharded.sums(s, zero_rank)
    for kind, buffer in buffers(s).items():
        for bucket in buffer.layout.buckets:
            calls += _bucket(s, kind, bucket, zero_rank)
        calls += _matrices(s, kind, buffer, zero_rank)
    return calls


def _bucket(s: Symbols, kind: Kind, bucket: Bucket, zero_rank: int) -> list[Call]:
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


def _owned(s: Symbols, kind: Kind, bucket: Bucket, owner: int, zero_rank: int) -> list[Call]:
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


def _matrices(s: Symbols, kind: Kind, buffer: Buffer, zero_rank: int) -> list[Call]:
    if not kind.needs_matrices or kind.split_over is None:
        return []
    size = wide(kind.dtype).itemsize
    owned = [s.split.size * each.elements * size for each in buffer.owned(zero_rank)]
    return [call for whole in owned for call in calls_of(s.split, AG, whole)]
