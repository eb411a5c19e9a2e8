"""Causal attention on CPU as row blocks of GEMMs.

Shapes: T tokens, N query heads, G key/value heads, Q = N / G query heads per group, D head dimension; L tokens of one
segment, B segments of one run, n = B * G pairs of a segment and a group, R rows of one block, S columns that the block sees.

A block sees all its columns at once, so it takes an ordinary softmax, and the backward pass makes the probabilities anew from
q and k: nothing else is saved. Short segments go through batched GEMMs over as many pairs as the cache holds. Long ones go
pair by pair, for then a single GEMM is large enough for the faster library (see ``gemm``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.ops import gemm

Run = tuple[int, int, int]  # (first token, segments, tokens of each)

_ROWS, _ROWS_SINGLE = 64, 256  # of a block of batched pairs, of a single pair
_SCORES = 2**19  # elements that the scores of a block may have, all pairs together
_SINGLE_WORK = 2**17  # Q * L * L per thread from which pairs go one by one


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scale: float, window: int | None
) -> Tensor:
    """Causal attention inside each segment of each run: [T, N, D], [T, G, D], [T, G, D] -> [T, N, D]."""
    return _BlockedAttention.apply(q, k, v, runs, scale, window)


class _Plan(NamedTuple):
    """How the segments of a run are cut up."""

    padded: int  # tokens of a segment, with those that only fill up its last block
    rows: int  # of a block
    together: int  # pairs worked on at once
    window: int | None


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scale: float, window: int | None
    ) -> Tensor:
        groups = k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype)
        for run in runs:
            plan = _plan(q, groups, run, window)
            qs, ks, vs = (_stack(_view(x, run, groups), plan.padded) for x in (q, k, v))
            qs.mul_(scale)
            outs = torch.empty_like(qs)
            for part in _parts(qs, plan):
                _forward(qs[part], ks[part, 0], vs[part, 0], outs[part], plan)
            _unstack(outs, _view(out, run, groups))
        ctx.save_for_backward(q, k, v)
        ctx.runs, ctx.scale, ctx.window = runs, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        groups = k.shape[1]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for run in ctx.runs:
            plan = _plan(q, groups, run, ctx.window)
            qs, ks, vs, douts = (_stack(_view(x, run, groups), plan.padded) for x in (q, k, v, dout))
            qs.mul_(ctx.scale)
            dqs, dks, dvs = torch.empty_like(qs), _zeros(ks, plan), _zeros(vs, plan)
            for part in _parts(qs, plan):
                _backward(
                    qs[part], ks[part, 0], vs[part, 0], douts[part], dqs[part], dks[part, 0], dvs[part, 0], plan
                )
            for stack, grad in zip((dqs.mul_(ctx.scale), dks, dvs), grads, strict=True):
                _unstack(stack, _view(grad, run, groups))
        return *grads, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: _Plan) -> None:
    """Attention of some pairs into ``out``: q scaled and out [..., Q, L, D], k and v [..., L, D]."""
    for rows, cols in _blocks(plan):
        probs = _probs(q[..., rows, :], k[..., cols, :], rows, cols, plan.window)
        block_out = out[..., rows, :]
        block_out.copy_(gemm.matmul(probs, v[..., cols, :]).view(block_out.shape))


def _backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, plan: _Plan
) -> None:
    """Gradients of some pairs into ``dq`` (for scaled q), and added to ``dk`` and ``dv``; shapes as in :func:`_forward`."""
    for rows, cols in _blocks(plan):
        block_q, block_dq, seen = q[..., rows, :], dq[..., rows, :], k[..., cols, :]
        block_dout = dout[..., rows, :].flatten(-3, -2)
        probs = _probs(block_q, seen, rows, cols, plan.window)
        dprobs = gemm.matmul(block_dout, v[..., cols, :].mT)
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        dv[..., cols, :].add_(gemm.matmul(probs.mT, block_dout))
        dk[..., cols, :].add_(gemm.matmul(dscores.mT, block_q.flatten(-3, -2)))
        block_dq.copy_(gemm.matmul(dscores, seen).view(block_dq.shape))


def _probs(q: Tensor, k: Tensor, rows: slice, cols: slice, window: int | None) -> Tensor:
    """Attention probabilities of a block: [..., Q, R, D], [..., S, D] -> [..., Q * R, S]."""
    scores = gemm.matmul(q.flatten(-3, -2), k.mT)
    by_head = scores.unflatten(-2, q.shape[-3:-1])  # [..., Q, R, S]
    size = q.shape[-2]
    by_head[..., rows.start - cols.start :].add_(_causal_bias(scores.dtype)[:size, :size])
    if window is not None:
        distance = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(cols.start, cols.stop)
        by_head.masked_fill_(distance >= window, float("-inf"))
    return torch.softmax(scores, -1)


@functools.cache
def _causal_bias(dtype: torch.dtype) -> Tensor:
    """-inf above the diagonal of a block, else 0: [rows, rows]."""
    return torch.full((_ROWS_SINGLE, _ROWS_SINGLE), float("-inf"), dtype=dtype).triu_(1)


def _plan(q: Tensor, groups: int, run: Run, window: int | None) -> _Plan:
    length, per_group = run[2], q.shape[1] // groups
    window = window if window is not None and window < length else None
    if per_group * length * length >= _SINGLE_WORK * torch.get_num_threads() and gemm.onednn_serves(q):
        rows = _ROWS_SINGLE if per_group == 1 else _ROWS_SINGLE // 2  # the heads of a group share a GEMM
        return _Plan(length + -length % gemm.TOKEN_MULTIPLE, rows, 1, window)
    return _Plan(length, _ROWS, max(1, _SCORES // (per_group * _ROWS * length)), window)


def _blocks(plan: _Plan) -> Iterator[tuple[slice, slice]]:
    """Row blocks of a segment, each with the columns that it sees."""
    for start in range(0, plan.padded, plan.rows):
        end = min(start + plan.rows, plan.padded)
        first = 0 if plan.window is None else max(0, start - plan.window + 1)
        yield slice(start, end), slice(first - first % gemm.TOKEN_MULTIPLE, end)


def _parts(stack: Tensor, plan: _Plan) -> Iterator[int | slice]:
    """Indices of the pairs of a stack to work on together; a single pair loses its dimension."""
    if plan.together == 1:
        return iter(range(stack.shape[0]))
    return (slice(start, start + plan.together) for start in range(0, stack.shape[0], plan.together))


def _view(x: Tensor, run: Run, groups: int) -> Tensor:
    """The tokens of a run by segment and group: [T, heads, D] -> [B, G, heads / G, L, D]."""
    start, count, length = run
    return x[start : start + count * length].unflatten(1, (groups, -1)).unflatten(0, (count, length)).permute(0, 2, 3, 1, 4)


def _stack(view: Tensor, padded: int) -> Tensor:
    """A contiguous copy, padded with zeros: [B, G, heads, L, D] -> [n, heads, padded, D]."""
    *shape, length, dim = view.shape
    stack = view.new_empty(*shape, padded, dim)
    stack[..., :length, :] = view
    stack[..., length:, :] = 0
    return stack.flatten(0, 1)


def _unstack(stack: Tensor, view: Tensor) -> None:
    """Write [n, heads, padded, D] to [B, G, heads, L, D], padding left out."""
    view.copy_(stack.unflatten(0, view.shape[:2])[..., : view.shape[3], :])


def _zeros(stack: Tensor, plan: _Plan) -> Tensor:
    """Room for sums, [n, 1, padded, D], in the order of features and tokens in which ``gemm.matmul`` returns the terms."""
    if plan.together > 1:
        return torch.zeros_like(stack)
    return stack.new_zeros(*stack.shape[:2], stack.shape[3], stack.shape[2]).mT
