"""Causal attention over packed segments.

Shapes: T tokens of all segments together, N query heads, G key/value heads, Q = N / G query heads per group, D head
dimension, L tokens of one segment, B segments of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.ops import reference
from internlm.ops.blocked_attention import blocked_attention
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.nearest import did_you_mean
from internlm.utils.optional import why_missing

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Segments:
    """Where the segments of a flattened batch begin and end; attention never crosses a bound."""

    cu_seqlens: Tensor  # int32 [segments + 1], on the device of the queries: 0, end of the first, ..., T
    max_seqlen: int
    runs: tuple[tuple[int, int, int], ...]  # (first token, segments, tokens of each), for neighbours of equal length

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Segments:
        """From the cumulative lengths [segments + 1], which begin with 0. Empty segments are dropped."""
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False) if end > start]
        runs, start = [], 0
        for length, equal in groupby(lengths):
            count = len(list(equal))
            runs.append((start, count, length))
            start += count * length
        if len(lengths) + 1 != len(bounds):
            cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=cu_seqlens.device)
        return cls(cu_seqlens.to(torch.int32), max(lengths, default=0), tuple(runs))

    @classmethod
    def uniform(cls, batch: int, seq_len: int, device: torch.device | str = "cpu") -> Segments:
        """``batch`` segments of ``seq_len`` tokens."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seq_len
        return cls(cu_seqlens, seq_len, ((0, batch, seq_len),))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first token, end) of every segment."""
        return [(s + i * length, s + (i + 1) * length) for s, count, length in self.runs for i in range(count)]


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float, "int | None"], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention inside each segment: [T, N, D], [T, G, D], [T, G, D] -> [T, N, D].

    ``scale`` multiplies the scores (default D ** -0.5); with ``window`` a token sees itself and the ``window - 1`` before.
    Raises :class:`ConfigError` where ``backend`` is unknown or can't serve this device and dtype.
    """
    if backend == "auto":
        backend = _choose(q)
    elif reason := why_unavailable(backend, q.device.type, q.dtype):
        raise ConfigError(Problem("attention backend", reason, "Use 'auto'."))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend](q, k, v, segments, scale, window)


def why_unavailable(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Why ``backend`` can't serve tensors of this kind; empty where it can."""
    if backend not in BACKENDS:
        return f"{backend!r} is unknown. {did_you_mean(backend, BACKENDS)}"
    if backend in ("flash", "varlen"):
        if device_type != "cuda":
            return f"'{backend}' runs on CUDA only, the tensors are on {device_type}"
        if dtype not in HALF:
            return f"'{backend}' takes float16 and bfloat16, not {dtype}"
        package = "flash_attn" if backend == "flash" else "torch.nn.attention.varlen"
        if reason := why_missing(package):
            return f"'{backend}' needs {package}, which can't be imported ({reason})"
    return ""


def _choose(q: Tensor) -> str:
    usable = (b for b in ("flash", "varlen") if not why_unavailable(b, q.device.type, q.dtype))
    return next(usable, "blocked" if q.device.type == "cpu" else "sdpa")


def _flash(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:  # pragma: no cover
    from flash_attn import flash_attn_varlen_func

    cu, longest = segments.cu_seqlens, segments.max_seqlen
    left = -1 if window is None else window - 1
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=(left, 0 if left >= 0 else -1)
    )


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:  # pragma: no cover
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = segments.cu_seqlens, segments.max_seqlen
    left = -1 if window is None else window - 1
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    outs = []
    for start, count, length in segments.runs:
        rows = slice(start, start + count * length)
        heads = [x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]  # [B, heads, L, D]
        if window is None or window >= length:
            out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=gqa)
        else:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
            out = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=gqa)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _blocked(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    return blocked_attention(q, k, v, segments.runs, scale, window)


def _reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    return reference.attention(q, k, v, segments.bounds, scale, window)


BACKENDS: dict[str, Kernel] = {
    "flash": _flash,
    "varlen": _varlen,
    "sdpa": _sdpa,
    "blocked": _blocked,
    "reference": _reference,
}
