"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv 2104.09864, eq. 34).

A head consists of D / 2 pairs of features. Each pair is rotated by an angle proportional to the position, so that the
score of a query and a key depends only on their distance. The pairs are (0, D/2), (1, D/2 + 1), ... as in Llama and
GPT-NeoX or, if interleaved, (0, 1), (2, 3), ... as in RoFormer.

Shapes: T tokens, N query heads, G key/value heads, Q = N / G query heads per group, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.accelerator import is_host
from internlm.ops import reference
from internlm.ops.cpu.blocked_attention import EqualLengthRun
from internlm.ops.cpu.cpu_gemm import runs_few_tokens
from internlm.ops.rope_scaling import ContextScaling
from internlm.utils.dtype import wide


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Base of the rotary frequencies, and their scaling for contexts longer than in training.

    Linear scaling divides positions by s = ``factor`` (position interpolation, Chen et al. 2023, arXiv 2306.15595).

    With ``dynamic_ntk``, positions are unchanged. Once a sequence of L tokens exceeds ``max_position``, the base
    becomes base * a ** (D / (D - 2)) with a = s * L / max_position - (s - 1) (dynamic NTK scaling, Peng et al. 2023,
    arXiv 2309.00071, section 3): high frequencies, which distinguish neighbouring tokens, hardly change, and the lowest
    frequency is divided by a.

    With ``context``, frequencies are scaled by their wavelength (:mod:`internlm.ops.rope_scaling`).
    """

    base: float = 10000.0
    factor: float = 1.0
    dynamic_ntk: bool = False
    max_position: int = 2048
    context: ContextScaling | None = None


UNSCALED = RotaryScaling()


def rotary_table(
    positions: Tensor,
    dim: int,
    scaling: RotaryScaling = UNSCALED,
    runs: Sequence[EqualLengthRun] = (),
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the rotation angles at ``positions``.

    Args:
        positions: Token positions, [T].
        dim: Head dimension D.
        scaling: Base and scaling of the frequencies.
        runs: Sequences to which the T tokens belong, in order; default: one sequence. Only dynamic NTK scaling uses
            them: each sequence has the base that it would have alone.
        lengths: Lengths of T sequences that have one token each in ``positions``, in place of ``runs``.
        dtype: Dtype of the result.

    Returns:
        Cosines and sines, each [T, D / 2].
    """
    # Computed in fp64: an fp32 angle at position 10⁶ has an error of 0.03 rad.
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    if scaling.context is not None:
        angles = torch.outer(positions.double(), scaling.context.scaled(scaling.base**-exponents, scaling.base))
        magnitude = scaling.context.magnitude
        return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)
    if scaling.dynamic_ntk:
        runs = runs or [EqualLengthRun(0, 1, len(positions))]
        sizes = [(run.length, run.tokens) for run in runs] if lengths is None else [(length, 1) for length in lengths]
        # Neighbours with the same base, such as all sequences of at most ``max_position`` tokens, are computed at once.
        by_base = groupby(sizes, lambda size: _ntk_base(scaling, dim, size[0]))
        bases = [(base, sum(tokens for _, tokens in neighbours)) for base, neighbours in by_base]
        parts = positions.double().split([tokens for _, tokens in bases])
    else:
        bases, parts = [(scaling.base, len(positions))], (positions.double() / scaling.factor,)
    angles = torch.cat([torch.outer(part, base**-exponents) for part, (base, _) in zip(parts, bases, strict=True)])
    return angles.cos().to(dtype), angles.sin().to(dtype)  # [T, D / 2]


def _ntk_base(scaling: RotaryScaling, dim: int, length: int) -> float:
    """Return the base of a sequence of ``length`` tokens under dynamic NTK scaling."""
    stretch = scaling.factor * length / scaling.max_position - (scaling.factor - 1)
    return float(scaling.base * max(stretch, 1.0) ** (dim / (dim - 2)))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate every head of ``x`` by the angles of its token: [T, N, D], [T, D / 2], [T, D / 2] → [T, N, D]."""
    return _ApplyRotary.apply(x, cos, sin, interleaved)


def split_qkv_rotary(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection and rotate q and k: [T, G, Q + 2, D] -> q [T, N, D], k [T, G, D], v [T, G, D].

    A group consists of Q query heads, a key head and a value head, in this order. The results are stored by head (they
    are views [T, N, D] of [N, T, D]), the order in which attention reads them.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses the plain formula better than it could a custom autograd function.
        return reference.split_qkv_rotary(qkv, cos, sin, interleaved)
    if runs_few_tokens(qkv):
        q_and_k = torch.empty_like(qkv[:, :, :-1])
        _rotate(qkv[:, :, :-1], cos, sin, interleaved, q_and_k)
        return q_and_k[:, :, :-1].flatten(1, 2), q_and_k[:, :, -1], qkv[:, :, -1]
    return _SplitQKVRotary.apply(qkv, cos, sin, interleaved)


class _ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out = torch.empty_like(x)
        _rotate(x, cos, sin, interleaved, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        dx = torch.empty_like(dout)
        # A rotation is orthogonal: its gradient is the rotation by the negative angle, so x is not saved. A factor of
        # both sines and cosines makes no difference.
        _rotate(dout, cos, sin, ctx.interleaved, dx, back=True)
        return dx, None, None, None


class _SplitQKVRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        slots = qkv.shape[2]
        q, k, v = (_new_heads(qkv, heads) for heads in (slots - 2, 1, 1))
        _rotate(qkv[:, :, :-2], cos, sin, interleaved, q)
        _rotate(qkv[:, :, -2:-1], cos, sin, interleaved, k)
        v.copy_(qkv[:, :, -1:])
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        tokens, groups, dim = dk.shape
        dq = dq.unflatten(1, (groups, -1))
        dqkv = dq.new_empty(tokens, groups, dq.shape[2] + 2, dim)
        _rotate(dq, cos, sin, ctx.interleaved, dqkv[:, :, :-2], back=True)
        _rotate(dk, cos, sin, ctx.interleaved, dqkv[:, :, -2], back=True)
        dqkv[:, :, -1].copy_(dv)
        return dqkv, None, None, None


def _new_heads(qkv: Tensor, heads: int) -> Tensor:
    """Return a new tensor for ``heads`` heads of each group of ``qkv`` [T, G, Q + 2, D]; its shape is [T, G, heads, D].

    In memory, heads come first on the CPU, whose kernels read one head at a time. The kernels of devices return their
    output in the layout of the queries, and the next product needs it token by token.
    """
    tokens, groups, _, dim = qkv.shape
    if is_host(qkv):
        return qkv.new_empty(groups, heads, tokens, dim).permute(2, 0, 1, 3)
    return qkv.new_empty(tokens, groups, heads, dim)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor, back: bool = False) -> None:
    """Rotate ``x``, or rotate it back, and write the result to ``out``, both [T, ..., D]."""
    # One head at a time on a core: a head fits into its cache, and is read and written several times. With several
    # threads, each operation on a head would be a parallel region of its own: see ``ops.gated``.
    if is_host(x) and x.dim() > 2 and torch.get_num_threads() == 1 and not runs_few_tokens(x):
        for head, out_head in zip(x.unbind(1), out.unbind(1), strict=True):
            _rotate(head, cos, sin, interleaved, out_head, back)
        return
    for _ in range(x.dim() - 2):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        _rotate_interleaved(x, cos, -sin if back else sin, out)
        return
    halves, out_halves = x.unflatten(-1, (2, -1)), out.unflatten(-1, (2, -1))  # [T, ..., 2, D / 2]
    (x1, x2), (out1, out2) = halves.unbind(-2), out_halves.unbind(-2)
    if is_host(x):  # a loop over the tokens of one half takes half the time of one over both halves of each token
        torch.mul(x1, cos, out=out1)
        torch.mul(x2, cos, out=out2)
    else:
        torch.mul(halves, cos.unsqueeze(-2), out=out_halves)
    out1.addcmul_(x2, sin, value=1 if back else -1)
    out2.addcmul_(x1, sin, value=-1 if back else 1)


def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate pairs of neighbouring features by one complex multiplication."""
    dtype = wide(x.dtype)  # complex numbers of half precision have few kernels
    rotations = torch.complex(cos.to(dtype), sin.to(dtype))
    numbers = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
    if x.dtype == dtype:
        torch.mul(numbers, rotations, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
    else:
        out.copy_(torch.view_as_real(numbers * rotations).flatten(-2))
