"""Causal attention within packed sequences: one function with a choice of several kernels.

Shapes: T tokens of all sequences, N query heads, G key/value heads, Q = N / G query heads per group, D head
dimension, L tokens of one sequence, B consecutive sequences of equal length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.accelerator import HOST, is_host, kind_of, to_device, to_host
from internlm.config.schema.model import AttentionBackend
from internlm.ops import reference
from internlm.ops.cpu.blocked_attention import EqualLengthRun, blocked_attention
from internlm.ops.cpu.kernel_choice import kernel_for
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.lazy import why_missing
from internlm.utils.torch_private import uncompiled


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Sequence boundaries of a flattened batch; tokens attend only within their own sequence."""

    cu_seqlens: Tensor  # int32 [sequences + 1], on the device of the queries: 0, end of the first, ..., T
    max_seqlen: int
    runs: tuple[EqualLengthRun, ...]

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, device: torch.device | None = None) -> PackedSequences:
        """Create boundaries from cumulative lengths, starting at 0; empty sequences are dropped.

        Args:
            cu_seqlens: Cumulative lengths, [sequences + 1]. Python needs their values to group sequences of equal
                length, so a tensor on an accelerator costs a host sync.
            device: Device of the queries; default: that of ``cu_seqlens``.
        """
        host = cu_seqlens if is_host(cu_seqlens) else to_host(cu_seqlens, "cu_seqlens on the device")
        bounds = host.tolist()
        lengths = [end - start for start, end in pairwise(bounds) if end > start]
        runs, start = [], 0
        for length, equal in groupby(lengths):
            count = len(list(equal))
            runs.append(EqualLengthRun(start, count, length))
            start += count * length
        if len(lengths) + 1 != len(bounds):
            host = torch.tensor([0, *accumulate(lengths)])
        on_device = to_device(host.to(torch.int32), cu_seqlens.device if device is None else device)
        return cls(on_device, max(lengths, default=0), tuple(runs))

    @classmethod
    def uniform(cls, batch: int, seq_len: int, device: torch.device | str = HOST) -> PackedSequences:
        """Create the boundaries of ``batch`` sequences with ``seq_len`` tokens each."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seq_len
        return cls(cu_seqlens, seq_len, (EqualLengthRun(0, batch, seq_len),))

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(run.tokens for run in self.runs)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Index of the first token and exclusive end index of each sequence."""
        return [(s + i * length, s + (i + 1) * length) for s, count, length in self.runs for i in range(count)]


Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, PackedSequences, float, "int | None"], Tensor]


# Not traced: the number and the lengths of the sequences change with every batch, and each change would recompile.
@uncompiled("attention depends on the sequence boundaries")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: PackedSequences,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Compute causal attention within each sequence (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    With grouped queries (Ainslie et al. 2023, arXiv 2305.13245), Q consecutive query heads share one key/value head.

    Args:
        q: Queries, [T, N, D].
        k: Keys, [T, G, D].
        v: Values, [T, G, D].
        sequences: Sequence boundaries, for T tokens in total.
        scale: Factor by which q · kᵀ is multiplied; by default D ** -0.5.
        window: Number of most recent tokens, including the token itself, that each token attends to. None: all.
        backend: Name of the kernel; ``auto`` selects the first of :data:`BACKENDS` that supports device, dtype and head
            dimension, on the CPU the one that is faster on its type of processor.

    Returns:
        Attention output, [T, N, D].

    Raises:
        ConfigError: ``backend`` is unknown, or does not support this device, dtype and head dimension.
    """
    device, dtype, head_dim = q.device.type, q.dtype, q.shape[-1]
    name: str = backend
    if backend == "auto":
        name = next(name for name in BACKENDS if not why_unavailable(name, device, dtype, head_dim))
        if name == "blocked":
            name = kernel_for("attention", "float32", sequences.max_seqlen)
    elif reason := why_unavailable(backend, device, dtype, head_dim):
        raise ConfigError(Problem("model.attention_backend", reason, "Set it to 'auto'"))
    assert sequences.tokens == q.shape[0], f"expected q with {sequences.tokens} tokens, got {q.shape[0]}"
    scale = head_dim**-0.5 if scale is None else scale
    return BACKENDS[name].kernel(q, k, v, sequences, scale, window)


def why_unavailable(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return the reason why ``backend`` does not support a device, dtype and head dimension; empty if it does."""
    if backend not in BACKENDS:
        return f"{backend!r} is unknown, expected one of {', '.join(BACKENDS)}"
    known, kind = BACKENDS[backend], kind_of(device_type)
    if known.on_host is not None and kind.is_host != known.on_host:
        return f"{backend!r} expected tensors on {'the CPU' if known.on_host else 'a GPU'}, got {device_type}"
    if known.dtypes and dtype not in known.dtypes:
        return f"{backend!r} expected tensors of {' or '.join(map(str, known.dtypes))}, got {dtype}"
    if known.limits and (reason := known.limits.why_exceeded(kind.compute_capability, head_dim)):
        return f"{backend!r} {reason}"
    if known.package and (reason := why_missing(known.package)):
        return f"{backend!r} needs the package '{known.package}', which cannot be imported ({reason})"
    return ""


# -- kernels. FlashAttention accepts cu_seqlens; sdpa does not, so it is called once per EqualLengthRun.


def _flash(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    """Call FlashAttention-2 (Dao 2023, arXiv 2307.08691)."""
    from flash_attn import flash_attn_varlen_func  # imported here, because it is optional

    cu, longest, left = sequences.cu_seqlens, sequences.max_seqlen, _left_window(window)
    # Torch's own kernels look at this switch themselves.
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = {"softmax_scale": scale, "causal": True, "window_size": (left, 0), "deterministic": deterministic}
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)


def _varlen(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    """Call the FlashAttention that is built into torch."""
    from torch.nn.attention.varlen import varlen_attn  # imported here, because it loads the compiler

    cu, longest, left = sequences.cu_seqlens, sequences.max_seqlen, _left_window(window)
    # A right window of 0 makes attention causal.
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True)
    return cast(Tensor, out)


def _left_window(window: int | None) -> int:
    """Convert ``window`` to FlashAttention's convention: number of tokens before the token itself, -1 for all."""
    return -1 if window is None else window - 1


def _blocked(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    return blocked_attention(q, k, v, sequences.runs, scale, window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    # One call per EqualLengthRun, because a block-diagonal mask of the whole row would take T² memory and time.
    outs = []
    sizes = [run.tokens for run in sequences.runs]
    for run, *qkv in zip(sequences.runs, *(_split_tokens(x, sizes) for x in (q, k, v)), strict=True):
        heads = [x.unflatten(0, (run.sequences, run.length)).transpose(1, 2) for x in qkv]  # [B, heads, L, D]
        if window is None or window >= run.length:
            out = _fused(*heads, scale=scale)
        else:
            out = _sdpa_window(*heads, scale=scale, window=window)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _split_tokens(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    # The gradient of a split writes all tokens once, that of a slice for each slice. One part needs neither.
    return x.split(sizes) if len(sizes) > 1 else (x,)


def _fused(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Call torch's kernel, causal unless there is a mask: [B, N, L, D], [B, G, L, D], [B, G, L, D] → [B, N, L, D]."""
    kind, head_dim, is_masked = kind_of(q.device), q.shape[-1], mask is not None
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and not kind.is_host and not groups_heads(kind.compute_capability, q.dtype, head_dim, is_masked):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        is_grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=not is_masked, scale=scale, enable_gqa=is_grouped
    )


def groups_heads(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, masked: bool) -> bool:
    """Return whether torch has a kernel for grouped queries on a GPU that does not store all L × L scores.

    FlashAttention is one, within its limits. The memory-efficient kernel, for all other cases, needs a key and value
    head for each query head.
    """
    return dtype in HALF and not masked and not VARLEN_LIMITS.why_exceeded(capability, head_dim)


def _sdpa_window(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
    """Compute sliding-window attention in blocks of ``window`` queries and fewer than ``2 * window`` keys."""
    # The mask then has at most 2 · window² elements, instead of L² for the whole sequence.
    outs, length = [], q.shape[2]
    for start in range(0, length, window):
        first, end = max(0, start - window + 1), min(start + window, length)
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        visible = (distance >= 0) & (distance < window)
        block = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        outs.append(_fused(*block, scale=scale, mask=visible))
    return torch.cat(outs, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, scale: float, window: int | None) -> Tensor:
    return reference.attention(q, k, v, sequences.bounds, scale, window)


class Limits(NamedTuple):
    """Least compute capability, and head dimensions, of a kernel."""

    capability: tuple[int, int] = (0, 0)
    most: int | None = None
    multiple: int = 1

    def why_exceeded(self, capability: tuple[int, int] | None, head_dim: int) -> str:
        """Return which limit a GPU of ``capability`` (None: has all) or ``head_dim`` exceeds; empty if none."""
        if capability is not None and capability < self.capability:
            least, got = (f"sm_{major}{minor}" for major, minor in (self.capability, capability))
            return f"needs a GPU of compute capability {least} or later, got {got}"
        if self.most is not None and head_dim > self.most:
            return f"expected a head dimension of at most {self.most}, got {head_dim}"
        if head_dim % self.multiple:
            return f"expected a head dimension divisible by {self.multiple}, got {head_dim}"
        return ""


class Backend(NamedTuple):
    """Attention kernel, and the device, dtypes, package and limits that it requires; by default no requirement."""

    kernel: Kernel
    on_host: bool | None = None  # on the CPU, or on a GPU
    dtypes: tuple[torch.dtype, ...] = ()
    package: str = ""
    limits: Limits | None = None


HALF = (torch.float16, torch.bfloat16)
#: Limits of FlashAttention-2. The flash-attn package pads other head dimensions to a multiple of 8; torch does not.
FLASH_LIMITS = Limits((8, 0), 256)
VARLEN_LIMITS = Limits((8, 0), 256, 8)

#: Backends in the order in which ``auto`` tries them, the fastest first.
BACKENDS: dict[str, Backend] = {
    "flash": Backend(_flash, False, HALF, "flash_attn", FLASH_LIMITS),
    "varlen": Backend(_varlen, False, HALF, "torch.nn.attention.varlen", VARLEN_LIMITS),
    "blocked": Backend(_blocked, True, (torch.float32, torch.float64)),
    "sdpa": Backend(_sdpa),
    "reference": Backend(_reference),
}
