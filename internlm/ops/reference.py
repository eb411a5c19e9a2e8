"""Reference implementations of the ops in plain torch with autograd; slow and memory-intensive.

Parity tests compare the kernels with these functions. Compiled blocks call some of them, because the compiler fuses
plain formulas. Formulas and sources are in the docstrings of the kernels.

Shapes: T tokens, H hidden size, N query heads, G key/value heads, Q = N / G query heads per group, D head dimension,
F intermediate features, V vocabulary entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.config.schema.model import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute RMSNorm over the last dimension: [T, H], [H] → [T, H]."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute layer normalisation over the last dimension: [T, H], [H], [H] → [T, H]."""
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate every head by the angles of its token: [T, N, D], [T, D / 2], [T, D / 2] → [T, N, D]."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return (rotated if interleaved else rotated.transpose(-1, -2)).flatten(-2)


def split_qkv_rotary(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection and rotate q and k: [T, G, Q + 2, D] -> q [T, N, D], k [T, G, D], v [T, G, D]."""
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    return apply_rotary(q, cos, sin, interleaved), apply_rotary(k, cos, sin, interleaved), v


def gated(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """Compute ``activation(gate) * up``: [T, 2, F] → [T, F]."""
    gate, up = gate_up.unbind(1)
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return F.gelu(gate, approximate="tanh") * up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[tuple[int, int]],
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute causal attention within each (start, end) of ``bounds``: [T, N, D], [T, G, D], [T, G, D] → [T, N, D]."""
    per_group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(per_group, 1), v.repeat_interleave(per_group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for start, end in bounds:
        scores = torch.einsum("inc,jnc->nij", q[start:end], k[start:end]) * scale
        index = torch.arange(end - start, device=q.device)
        distance = index[:, None] - index
        masked = distance < 0
        if window is not None:
            masked = masked | (distance >= window)
        weights = scores.masked_fill(masked, float("-inf")).softmax(-1)
        outs.append(torch.einsum("nij,jnc->inc", weights, v[start:end]))
    return torch.cat(outs) if outs else torch.empty_like(q)


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy of each token, 0 if its label is -100: [T, V], [T] → [T]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing, ignore_index=-100)
