"""Causal attention over packed sequences.

Shapes: T tokens of all sequences together, N query heads, G key/value heads, Q = N / G query heads per group, D head
dimension, L tokens of one sequence, B sequences of one run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.ops import reference
from internlm.ops.blocked_attention import blocked_attention
from internlm.utils.errors import ConfigError, Problem, did_you_mean
from internlm.utils.lazy import why_missing
from internlm.utils.torch_private import uncompiled


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the sequences of a flattened batch begin and end; attention never crosses a bound."""

    cu_seqlens: Tensor  # int32 [sequences + 1], on the device of the queries: 0, end of the first, ..., T
    max_seqlen: int
    runs: tuple[tuple[int, int, int], ...]  # (first token, sequences, tokens of each), for neighbours of equal length

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> PackedSequences:
        """From the cumulative lengths [sequences + 1], which begin with 0. Empty sequences are dropped."""
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds) if end > start]
        runs, start = [], 0
        for length, equal in groupby(lengths):
            count = len(list(equal))
            runs.append((start, count, length))
            start += count * length
        if len(lengths) + 1 != len(bounds):
            cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=cu_seqlens.device)
        return cls(cu_seqlens.to(torch.int32), max(lengths, default=0), tuple(runs))

    @classmethod
    def uniform(cls, batch: int, seq_len: int, device: torch.device | str = "cpu") -> PackedSequences:
        """``batch`` sequences of ``seq_len`` tokens."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seq_len
        return cls(cu_seqlens, seq_len, ((0, batch, seq_len),))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(count * length for _, count, length in self.runs)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first token, end) of every sequence."""
        return [(s + i * length, s + (i + 1) * length) for s, count, length in self.runs for i in range(count)]


Kernel = Callable[[Tensor, Tensor, Tensor, PackedSequences, float, "int | None"], Tensor]


@uncompiled("attention depends on the sequence boundaries")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: PackedSequences,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention inside each sequence: [T, N, D], [T, G, D], [T, G, D] -> [T, N, D].

    ``scale`` multiplies the scores (default D ** -0.5). With ``window`` a token sees that many tokens, itself the last.
    Raises :class:`ConfigError` where ``backend`` is unknown or can't serve this device and dtype.
    """
    device, dtype = q.device.type, q.dtype
    if backend == "auto":
        backend = next(name for name in BACKENDS if not why_unavailable(name, device, dtype))
    elif reason := why_unavailable(backend, device, dtype):
        raise ConfigError(Problem("attention backend", reason, "Use 'auto'."))
    assert sequences.tokens == q.shape[0], f"sequences of {sequences.tokens} tokens for {q.shape[0]}"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend].kernel(q, k, v, sequences, scale, window)


def why_unavailable(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Why ``backend`` can't serve tensors of this kind; empty where it can."""
    if backend not in BACKENDS:
        return f"{backend!r} is unknown. {did_you_mean(backend, BACKENDS)}"
    known = BACKENDS[backend]
    if known.device and device_type != known.device:
        return f"{backend!r} runs on {known.device} only, the tensors are on {device_type}"
    if known.dtypes and dtype not in known.dtypes:
        return f"{backend!r} takes {', '.join(map(str, known.dtypes))}, the tensors are {dtype}"
    if known.package and (reason := why_missing(known.package)):
        return f"{backend!r} needs the package '{known.package}', which can't be imported ({reason})"
    return ""


def _flash(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest, reach = sequences.cu_seqlens, sequences.max_seqlen, _reach(window)
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=(reach, 0)
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, reach = sequences.cu_seqlens, sequences.max_seqlen, _reach(window)
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(reach, 0), enable_gqa=True)
    return cast(Tensor, out)


def _reach(window: int | None) -> int:
    """Tokens that a token sees before itself; -1 for all."""
    return -1 if window is None else window - 1


def _blocked(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    return blocked_attention(q, k, v, sequences.runs, scale, window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    outs = []
    for start, count, length in sequences.runs:
        rows = slice(start, start + count * length)
        run = [x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]  # [B, heads, L, D]
        kernel = _sdpa_run if window is None or window >= length else functools.partial(_sdpa_window, window=window)
        outs.append(kernel(*run, scale=scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _sdpa_run(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_window(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
    """In blocks of ``window`` rows, which see less than ``2 * window`` columns: the mask stays that small."""
    outs, length = [], q.shape[2]
    for start in range(0, length, window):
        first, end = max(0, start - window + 1), min(start + window, length)
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        seen = (distance >= 0) & (distance < window)
        block = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        outs.append(
            F.scaled_dot_product_attention(*block, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        )
    return torch.cat(outs, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    return reference.attention(q, k, v, sequences.bounds, scale, window)


class Backend(NamedTuple):
    """A way to compute attention, and what it serves; empty fields mean everything."""

    kernel: Kernel
    device: str = ""
    dtypes: tuple[torch.dtype, ...] = ()
    package: str = ""


HALF = (torch.float16, torch.bfloat16)

#: In the order in which "auto" tries them.
BACKENDS: dict[str, Backend] = {
    "flash": Backend(_flash, "cuda", HALF, "flash_attn"),
    "varlen": Backend(_varlen, "cuda", HALF, "torch.nn.attention.varlen"),
    "blocked": Backend(_blocked, "cpu", (torch.float32, torch.float64)),
    "sdpa": Backend(_sdpa),
    "reference": Backend(_reference),
}
