"""Causal attention on CPU as row blocks of GEMMs.

Shapes: T tokens, N query heads, G key/value heads, Q = N / G query heads per group, D head dimension; L tokens of one
sequence, B sequences of one run, n pairs of a sequence and a group, R rows of one block, S columns that the block sees.

A block has all the scores of its rows, so it takes an ordinary softmax, and the backward pass makes the probabilities
anew from q and k: nothing else is saved. Short sequences go through batched GEMMs over all pairs that fit the cache.
Long ones go pair by pair, for then a single GEMM is large enough for the faster library (see ``gemm``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.ops import gemm
from internlm.utils.torch_private import softmax_backward

Run = tuple[int, int, int]  # (first token, sequences, tokens of each)
Pairs = tuple[int, int] | tuple[slice, slice]  # indices of sequences and of groups

_ROWS, _ROWS_SINGLE = 64, 256  # of a block of batched pairs, of a single pair
_SCORES = 2**19  # elements that the scores of a block may have, all pairs together
_SINGLE_WORK = 2**17  # Q * L * L per thread from which pairs go one by one


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scale: float, window: int | None
) -> Tensor:
    """Causal attention inside each sequence of each run: [T, N, D], [T, G, D], [T, G, D] -> [T, N, D]."""
    return _BlockedAttention.apply(q, k, v, runs, scale, window)


class _Plan(NamedTuple):
    """How the sequences of a run are cut up."""

    groups: int
    together: int  # pairs worked on at once
    rows: int  # of a block
    padded: int  # tokens of a sequence, with those that only fill up its last block
    scale: float
    window: int | None


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scale: float, window: int | None
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        for run in runs:
            plan = _plan(q, k.shape[1], run, scale, window)
            for pairs in _pairs(run, plan):
                target = _view(out, run, plan)[pairs]
                _forward(plan, target, *(_take(x, run, pairs, plan) for x in (q, k, v)))
        ctx.save_for_backward(q, k, v)
        ctx.runs, ctx.scale, ctx.window = runs, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for run in ctx.runs:
            plan = _plan(q, k.shape[1], run, ctx.scale, ctx.window)
            for pairs in _pairs(run, plan):
                taken = (_take(x, run, pairs, plan) for x in (q, k, v, dout))
                _backward(plan, *taken, *(_view(grad, run, plan)[pairs] for grad in grads))
        return *grads, None, None, None


def _forward(plan: _Plan, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Attention of some pairs into ``out``: q [..., Q, L, D], k and v [..., 1, L, D]."""
    k, v = k.squeeze(-3), v.squeeze(-3)
    for rows, cols in _blocks(plan):
        probs = _probs(_block(q, rows) * plan.scale, k[..., cols, :], rows, cols, plan)
        _put(gemm.matmul(probs, v[..., cols, :]), out, rows)


def _backward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Gradients of some pairs into ``dq``, ``dk`` and ``dv``; shapes as in :func:`_forward`."""
    k, v = k.squeeze(-3), v.squeeze(-3)
    sum_dk, sum_dv = _zeros(k, plan), _zeros(v, plan)
    for rows, cols in _blocks(plan):
        block_q, block_dout = _block(q, rows) * plan.scale, _block(dout, rows).contiguous()
        seen = k[..., cols, :]
        probs = _probs(block_q, seen, rows, cols, plan)
        dprobs = gemm.matmul(block_dout, v[..., cols, :].mT)
        dscores = softmax_backward(dprobs, probs)
        sum_dv[..., cols, :].add_(gemm.matmul(probs.mT, block_dout))
        sum_dk[..., cols, :].add_(gemm.matmul(dscores.mT, block_q))
        _put(gemm.matmul(dscores, seen).mul_(plan.scale), dq, rows)
    everything = slice(0, plan.padded)
    _put(sum_dk, dk, everything)
    _put(sum_dv, dv, everything)


def _probs(q: Tensor, k: Tensor, rows: slice, cols: slice, plan: _Plan) -> Tensor:
    """Attention probabilities of a block, q scaled: [..., Q * R, D], [..., S, D] -> [..., Q * R, S]."""
    scores = gemm.matmul(q, k.mT)
    size = rows.stop - rows.start
    by_head = scores.unflatten(-2, (-1, size))  # [..., Q, R, S]
    by_head[..., rows.start - cols.start :].add_(_causal_bias(scores.dtype)[:size, :size])
    if plan.window is not None:
        distance = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(cols.start, cols.stop)
        by_head.masked_fill_(distance >= plan.window, float("-inf"))
    return torch.softmax(scores, -1)


@functools.cache
def _causal_bias(dtype: torch.dtype) -> Tensor:
    """-inf above the diagonal of a block, else 0: [rows, rows]."""
    return torch.full((_ROWS_SINGLE, _ROWS_SINGLE), float("-inf"), dtype=dtype).triu_(1)


def _plan(q: Tensor, groups: int, run: Run, scale: float, window: int | None) -> _Plan:
    length, per_group = run[2], q.shape[1] // groups
    window = window if window is not None and window < length else None
    if per_group * length * length >= _SINGLE_WORK * torch.get_num_threads() and gemm.onednn_serves(q):
        rows = _ROWS_SINGLE if per_group == 1 else _ROWS_SINGLE // 2  # the heads of a group share a GEMM
        return _Plan(groups, 1, rows, length + -length % gemm.TOKEN_MULTIPLE, scale, window)
    together = max(2, _SCORES // (per_group * _ROWS * length))
    return _Plan(groups, together, _ROWS, length, scale, window)


def _pairs(run: Run, plan: _Plan) -> Iterator[Pairs]:
    """Pairs of a sequence and a group to work on together, as indices of a view."""
    sequences, groups = range(run[1]), range(plan.groups)
    if plan.together == 1:
        return itertools.product(sequences, groups)
    per_segment = min(plan.together, plan.groups)
    return itertools.product(_slices(sequences, plan.together // per_segment), _slices(groups, per_segment))


def _slices(indices: range, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in indices[::step])


def _blocks(plan: _Plan) -> Iterator[tuple[slice, slice]]:
    """Row blocks of a sequence, each with the columns that it sees."""
    for start in range(0, plan.padded, plan.rows):
        end = min(start + plan.rows, plan.padded)
        first = 0 if plan.window is None else max(0, start - plan.window + 1)
        yield slice(start, end), slice(first - first % gemm.TOKEN_MULTIPLE, end)


def _view(x: Tensor, run: Run, plan: _Plan) -> Tensor:
    """The tokens of a run by sequence and group: [T, heads, D] -> [B, G, heads / G, L, D]."""
    start, count, length = run
    x = x[start : start + count * length].unflatten(1, (plan.groups, -1)).unflatten(0, (count, length))
    return x.permute(0, 2, 3, 1, 4)


def _take(x: Tensor, run: Run, pairs: Pairs, plan: _Plan) -> Tensor:
    """What some pairs read, padded with zeros: [T, heads, D] -> [n, heads / G, L, D], without n for a single pair."""
    x = _view(x, run, plan)[pairs]
    if plan.together > 1:
        x = x.flatten(0, 1)
    return F.pad(x, (0, 0, 0, plan.padded - run[2])) if plan.padded > run[2] else x


def _block(x: Tensor, rows: slice) -> Tensor:
    """Rows of all heads of a pair: [..., heads, L, D] -> [..., heads * R, D]."""
    return x[..., rows, :].flatten(-3, -2)


def _put(block: Tensor, target: Tensor, rows: slice) -> None:
    """Write [..., heads * R, D] to rows of [sequences, groups, heads, L, D] or [heads, L, D], padding left out."""
    target = target[..., rows, :]
    *heads, length, dim = target.shape
    target.copy_(block.reshape(*heads, -1, dim)[..., :length, :])


def _zeros(x: Tensor, plan: _Plan) -> Tensor:
    """Zeros like [..., L, D], with features and tokens in the order in which ``gemm.matmul`` returns a gradient."""
    return torch.zeros_like(x) if plan.together > 1 else x.new_zeros(x.shape[::-1]).mT
