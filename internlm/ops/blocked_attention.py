"""Causal attention on CPU as row blocks of batched GEMMs.

Shapes: as in ``attention.py``; R rows of one block, S key/value tokens that a block sees.
The backward pass recomputes the probabilities from the saved log-sum-exp (Dao et al. 2022, FlashAttention, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Runs = tuple[tuple[int, int, int], ...]
_BLOCK = 128


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, window: int | None) -> Tensor:
    """Causal attention inside each segment: [T, N, D], [T, G, D], [T, G, D] -> [T, N, D]."""
    return _BlockedAttention.apply(q, k, v, runs, scale, window)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, window: int | None
    ) -> Tensor:
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32 if q.dtype != torch.float64 else q.dtype)
        groups = k.shape[1]
        for run in runs:
            qs, ks, vs, outs, lses = (_heads(x, run, groups) for x in (q, k, v, out, lse[..., None]))
            for rows, cols in _blocks(run[2], window):
                scores = _scores(qs, ks, rows, cols, scale, window)  # [B, G, Q * R, S]
                row_lse = torch.logsumexp(scores, -1, keepdim=True)
                probs = torch.exp(scores.sub_(row_lse))
                _put(lses, rows, row_lse)
                _put(outs, rows, probs.to(q.dtype) @ vs[:, :, 0, cols])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.runs, ctx.scale, ctx.window = runs, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        groups, scale = k.shape[1], ctx.scale
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (out * dout).sum(-1, dtype=lse.dtype)
        for run in ctx.runs:
            qs, ks, vs, douts, lses, deltas, dqs, dks, dvs = (
                _heads(x, run, groups) for x in (q, k, v, dout, lse[..., None], delta[..., None], dq, dk, dv)
            )
            for rows, cols in _blocks(run[2], ctx.window):
                scores = _scores(qs, ks, rows, cols, scale, ctx.window)
                probs = scores.sub_(_take(lses, rows)).exp_()
                row_dout = _take(douts, rows)
                dprobs = (row_dout @ vs[:, :, 0, cols].mT).to(probs.dtype)
                dscores = dprobs.sub_(_take(deltas, rows)).mul_(probs).mul_(scale).to(q.dtype)
                dvs[:, :, 0, cols] += probs.to(q.dtype).mT @ row_dout
                dks[:, :, 0, cols] += dscores.mT @ _take(qs, rows)
                _put(dqs, rows, dscores @ ks[:, :, 0, cols])
        return dq, dk, dv, None, None, None


def _heads(x: Tensor, run: tuple[int, int, int], groups: int) -> Tensor:
    """The tokens of a run, by segment and group: [T, heads, D] -> [B, G, heads / G, L, D]."""
    start, count, length = run
    x = x[start : start + count * length].unflatten(0, (count, length)).unflatten(2, (groups, -1))
    return x.permute(0, 2, 3, 1, 4)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Row blocks of a segment, each with the columns that it sees."""
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _take(x: Tensor, rows: slice) -> Tensor:
    """[B, G, Q, L, D] -> [B, G, Q * R, D]."""
    return x[:, :, :, rows].flatten(2, 3)


def _put(x: Tensor, rows: slice, value: Tensor) -> None:
    """The inverse of :func:`_take`."""
    x[:, :, :, rows] = value.unflatten(2, (x.shape[2], -1))


def _scores(qs: Tensor, ks: Tensor, rows: slice, cols: slice, scale: float, window: int | None) -> Tensor:
    """Scaled scores of a block, -inf where a key is hidden: [B, G, Q * R, S]."""
    q = _take(qs, rows)
    scores = (q * scale) @ ks[:, :, 0, cols].mT
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    col = torch.arange(cols.start, cols.stop, device=q.device)
    hidden = (col > row) if window is None else (col > row) | (col <= row - window)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    scores.unflatten(2, (qs.shape[2], -1)).masked_fill_(hidden, float("-inf"))
    return scores
