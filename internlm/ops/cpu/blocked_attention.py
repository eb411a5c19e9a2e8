"""Causal attention on the CPU: GEMMs over blocks of rows, with an ordinary softmax per block.

FlashAttention (arXiv 2205.14135) tiles rows and columns, because a GPU's shared memory holds only a small tile, and
therefore needs the online softmax (arXiv 1805.02867), which rescales partial sums as columns arrive. A CPU's L2 cache
holds the scores of a block of rows against *all* its columns, so this kernel tiles rows only: it uses torch's softmax,
rescales nothing, and needs neither the log-sum-exp nor the output in the backward pass. As in FlashAttention, the
backward pass recomputes the probabilities from q and k; only q, k and v are saved.

Short sequences use batched GEMMs over as many (sequence, group) pairs as fit into the cache. Long sequences use one
GEMM per pair, because oneDNN is faster than torch's own matmul only for unbatched GEMMs (see ``cpu_gemm``).

Shapes: T tokens, N query heads, G key/value heads, Q = N / G query heads per group, D head dimension; L tokens of one
sequence, B consecutive sequences of equal length, n pairs of a sequence and a group, R rows of one block, S columns
visible to it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.ops.cpu import cpu_gemm
from internlm.utils.torch_private import softmax_backward

# Indices (sequence, kv group) of one pair, or slices of such indices for several pairs.
Pairs: TypeAlias = tuple[int, int] | tuple[slice, slice]
QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]

_ROWS, _ROWS_SINGLE = 64, 256  # rows of a block: batched pairs, single pair
_SCORES = 2**19  # elements in the scores of a block, all pairs together: 2 MiB in fp32
_SINGLE_WORK = 2**17  # Q * L * L per thread from which pairs are computed one at a time


class EqualLengthRun(NamedTuple):
    """Consecutive sequences of equal length, which can be computed as one batch."""

    start: int  # first token
    sequences: int
    length: int  # tokens of each sequence

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return self.sequences * self.length


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[EqualLengthRun, ...], scale: float, window: int | None
) -> Tensor:
    """Compute causal attention within each sequence of ``runs``: [T, N, D], [T, G, D], [T, G, D] → [T, N, D].

    See :func:`internlm.ops.attention` for the meaning of ``scale`` and ``window``.
    """
    return _BlockedAttention.apply(q, k, v, runs, scale, window)


class _Plan(NamedTuple):
    """Plan for the attention of one :class:`EqualLengthRun`: sizes of its batches and blocks."""

    groups: int
    together: int  # pairs per batched matmul
    rows: int  # rows of a block
    padded: int  # tokens of a sequence, including padding
    scale: float
    window: int | None


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: tuple[EqualLengthRun, ...],
        scale: float,
        window: int | None,
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
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for run in ctx.runs:
            plan = _plan(q, k.shape[1], run, ctx.scale, ctx.window)
            for pairs in _pairs(run, plan):
                pair_q, pair_k, pair_v, pair_dout = (_take(x, run, pairs, plan) for x in (q, k, v, dout))
                pair_dq, pair_dk, pair_dv = (_view(grad, run, plan)[pairs] for grad in (dq, dk, dv))
                _backward(plan, (pair_q, pair_k, pair_v), pair_dout, (pair_dq, pair_dk, pair_dv))
        return dq, dk, dv, None, None, None


def _forward(plan: _Plan, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Write the attention output of (sequence, kv group) pairs to ``out``: q [..., Q, L, D], k and v [..., 1, L, D]."""
    k, v = k.squeeze(-3), v.squeeze(-3)
    for rows, cols in _blocks(plan):
        # Scaling q costs R · D multiplications, scaling the scores R · S.
        probs = _probs(_block(q, rows) * plan.scale, k[..., cols, :], rows, cols, plan)
        _put(cpu_gemm.matmul(probs, v[..., cols, :]), out, rows)


def _backward(plan: _Plan, qkv: QKV, dout: Tensor, grads: QKV) -> None:
    """Write dq, dk and dv of (sequence, kv group) pairs to ``grads`` (arXiv 2205.14135, app. B.2).

    q, dout and dq have the shape [..., Q, L, D]; k, v, dk and dv have the shape [..., 1, L, D].
    """
    (q, k, v), (dq, dk, dv) = qkv, grads
    k, v = k.squeeze(-3), v.squeeze(-3)
    sum_dk, sum_dv = _zeros(k, plan), _zeros(v, plan)
    for rows, cols in _blocks(plan):
        block_q, block_dout = _block(q, rows) * plan.scale, _block(dout, rows).contiguous()
        block_k = k[..., cols, :]
        probs = _probs(block_q, block_k, rows, cols, plan)
        dprobs = cpu_gemm.matmul(block_dout, v[..., cols, :].mT)
        dscores = softmax_backward(dprobs, probs)
        # Not `sum_dv[...] += x`, which would also copy the slice onto itself.
        sum_dv[..., cols, :].add_(cpu_gemm.matmul(probs.mT, block_dout))
        sum_dk[..., cols, :].add_(cpu_gemm.matmul(dscores.mT, block_q))  # block_q includes the scale
        _put(cpu_gemm.matmul(dscores, block_k).mul_(plan.scale), dq, rows)
    everything = slice(0, plan.padded)
    _put(sum_dk, dk, everything)
    _put(sum_dv, dv, everything)


def _probs(q: Tensor, k: Tensor, rows: slice, cols: slice, plan: _Plan) -> Tensor:
    """Compute the attention probabilities of a block from scaled q: [..., Q * R, D], [..., S, D] → [..., Q * R, S]."""
    scores = cpu_gemm.matmul(q, k.mT)
    size = rows.stop - rows.start
    by_head = scores.unflatten(-2, (-1, size))  # [..., Q, R, S]
    # Rows and columns end at the same token, so only the last R columns, the diagonal block, need the causal mask.
    by_head[..., rows.start - cols.start :].add_(_causal_bias(scores.dtype)[:size, :size])
    if plan.window is not None:
        distance = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(cols.start, cols.stop)
        by_head.masked_fill_(distance >= plan.window, float("-inf"))
    return torch.softmax(scores, -1)


@functools.cache
def _causal_bias(dtype: torch.dtype) -> Tensor:
    """Create the causal bias of a diagonal block, -inf above the diagonal and 0 elsewhere: [rows, rows]."""
    return torch.full((_ROWS_SINGLE, _ROWS_SINGLE), float("-inf"), dtype=dtype).triu_(1)


def _plan(q: Tensor, groups: int, run: EqualLengthRun, scale: float, window: int | None) -> _Plan:
    length, per_group = run.length, q.shape[1] // groups
    window = window if window is not None and window < length else None
    if per_group * length * length >= _SINGLE_WORK * torch.get_num_threads() and cpu_gemm.onednn_serves(q):
        rows = _ROWS_SINGLE if per_group == 1 else _ROWS_SINGLE // 2  # the heads of a group share a GEMM
        # Padding limits the number of shapes, because oneDNN compiles a kernel for each.
        return _Plan(groups, 1, rows, length + -length % cpu_gemm.TOKEN_MULTIPLE, scale, window)
    together = max(2, _SCORES // (per_group * _ROWS * length))
    return _Plan(groups, together, _ROWS, length, scale, window)


def _pairs(run: EqualLengthRun, plan: _Plan) -> Iterator[Pairs]:
    """Yield the indices of the (sequence, kv group) pairs that are computed together, batch by batch."""
    sequences, groups = range(run.sequences), range(plan.groups)
    if plan.together == 1:
        return itertools.product(sequences, groups)
    per_sequence = min(plan.together, plan.groups)
    return itertools.product(_slices(sequences, plan.together // per_sequence), _slices(groups, per_sequence))


def _slices(indices: range, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in indices[::step])


def _blocks(plan: _Plan) -> Iterator[tuple[slice, slice]]:
    """Yield the row blocks of a sequence, each with the columns visible to it."""
    for start in range(0, plan.padded, plan.rows):
        end = min(start + plan.rows, plan.padded)
        first = 0 if plan.window is None else max(0, start - plan.window + 1)
        yield slice(start, end), slice(first - first % cpu_gemm.TOKEN_MULTIPLE, end)


# -- conversion between the layout of the model, [T, heads, D], and that of a block


def _view(x: Tensor, run: EqualLengthRun, plan: _Plan) -> Tensor:
    """View the tokens of ``run`` by sequence, and their heads by kv group: [T, heads, D] → [B, G, heads / G, L, D]."""
    x = x[run.start : run.start + run.tokens].unflatten(1, (plan.groups, -1)).unflatten(0, (run.sequences, run.length))
    return x.permute(0, 2, 3, 1, 4)


def _take(x: Tensor, run: EqualLengthRun, pairs: Pairs, plan: _Plan) -> Tensor:
    """Select q, k or v of (sequence, kv group) pairs: [T, heads, D] → [n, heads / G, L, D], without n for one pair.

    A single pair is padded with zeros to a multiple of ``TOKEN_MULTIPLE`` tokens. Padded keys come after all real
    tokens, so the causal mask hides them.
    """
    x = _view(x, run, plan)[pairs]
    if plan.together > 1:
        x = x.flatten(0, 1)
    return F.pad(x, (0, 0, 0, plan.padded - run.length)) if plan.padded > run.length else x


def _block(x: Tensor, rows: slice) -> Tensor:
    """Stack R of the L rows of each head into a GEMM operand: [..., heads, L, D] → [..., heads * R, D]."""
    return x[..., rows, :].flatten(-3, -2)


def _put(block: Tensor, target: Tensor, rows: slice) -> None:
    """Write ``block``, [..., heads * R, D], to ``rows`` of ``target``, [..., heads, L, D], without padding."""
    target = target[..., rows, :]
    *heads, length, dim = target.shape
    target.copy_(block.reshape(*heads, -1, dim)[..., :length, :])


def _zeros(x: Tensor, plan: _Plan) -> Tensor:
    """Create zeros like ``x``, [..., L, D], but in the memory layout in which ``matmul`` returns its result."""
    return torch.zeros_like(x) if plan.together > 1 else x.new_zeros(x.shape[::-1]).mT
