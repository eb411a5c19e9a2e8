"""Normalisation of queries and keys before rotary embedding (QK-norm, Dehghani et al. 2023, arXiv 2302.05442).

Shapes: T tokens, G kv heads, Q query heads per kv head, D head dimension.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from internlm.core.parallel.communicator import IDENTITY_HEADS, HeadsCommunicator
from internlm.core.parallel.param_state import place
from internlm.core.parallel.placement import constant
from internlm.core.parallel.sharding import current_sharding
from internlm.ops import rms_norm
from internlm.utils.dtype import wide
from internlm.utils.torch_private import uncompiled


class QKNorm(nn.Module):
    """RMSNorm of the queries and of the keys of a fused projection; values are unchanged.

    Args:
        scope: ``head``: each head is normalised by itself, with a weight [D] that all heads share. ``projection``: all
            heads of a token are normalised together, with a weight for each element.
        shape: Shape of the fused projection of a token, (G, Q + 2, D).
        eps: Epsilon, added to the mean square.
        offset: Number added to the weights.
    """

    role = "heads"
    communicator: HeadsCommunicator = IDENTITY_HEADS

    def __init__(
        self, scope: Literal["head", "projection"], shape: tuple[int, int, int], eps: float, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.scope, self.eps, self.offset = scope, eps, offset
        groups, slots, dim = shape
        #: Elements that are normalised together on all ranks: of the queries, and of the keys.
        self.counts = (groups * (slots - 2) * dim, groups * dim)
        sharding, init = current_sharding(), constant(1 - offset)
        if scope == "head":
            self.q_weight = place(sharding.per_head((dim,), init))
            self.k_weight = place(sharding.per_head((dim,), init))
        else:
            # Split by heads like the output of the projection.
            self.q_weight = place(sharding.bias_of("column", (groups, slots - 2, dim), init))
            self.k_weight = place(sharding.bias_of("column", (groups, 1, dim), init))

    def forward(self, qkv: Tensor) -> Tensor:
        """Normalise queries and keys: [T, G, Q + 2, D] → [T, G, Q + 2, D]."""
        if self.scope == "projection":
            return _normalise_together(qkv, self)
        q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), 2)
        q, k = (rms_norm(x, w, self.eps, self.offset) for x, w in ((q, self.q_weight), (k, self.k_weight)))
        return torch.cat((q, k, v), 2)


# Not traced: its sums need a collective, in forward and in backward.
@uncompiled("ranks sum over their heads")
def _normalise_together(qkv: Tensor, norm: QKNorm) -> Tensor:
    """Normalise all queries of a token together, and all its keys: [T, G, Q + 2, D] → [T, G, Q + 2, D]."""
    return _ProjectionNorm.apply(qkv, norm.q_weight, norm.k_weight, norm)


class _ProjectionNorm(torch.autograd.Function):
    """Autograd function of the norm of whole projections; it saves its input and two numbers per token."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, norm: QKNorm) -> Tensor:
        width = wide(qkv.dtype)
        norms = [torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=width) for x in _queries_and_keys(qkv)]
        means = _mean_over_heads(torch.stack(norms, 1).square_(), norm)
        inverse = means.add_(norm.eps).rsqrt_()  # [T, 2]
        ctx.save_for_backward(qkv, inverse)
        # Parameters are not saved as tensors: offloading and other hooks on saved tensors would pack them.
        ctx.weights, ctx.norm = (q_weight, k_weight), norm
        out = qkv.clone()
        for x, scale, weight in zip(_queries_and_keys(out), _per_token(inverse), ctx.weights, strict=True):
            x.copy_(x * scale * (weight + norm.offset))  # scale is wide, so the result is rounded once
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of RMSNorm.

        With g = dout · weight and r = 1 / rms: dx = r · (g - r² · x · mean(g · x)), and dweight = sum(dout · r · x).
        """
        qkv, inverse = ctx.saved_tensors
        norm, xs, douts = ctx.norm, _queries_and_keys(qkv), _queries_and_keys(dout)
        scales, weights = _per_token(inverse), [weight + norm.offset for weight in ctx.weights]
        normalised = [x * scale for x, scale in zip(xs, scales, strict=True)]
        dweights = [(dy * y).sum(0).to(w.dtype) for dy, y, w in zip(douts, normalised, ctx.weights, strict=True)]
        gs = [dy * weight for dy, weight in zip(douts, weights, strict=True)]
        sums = torch.stack([(g * y).sum((1, 2, 3)) for g, y in zip(gs, normalised, strict=True)], 1)
        means = _per_token(_mean_over_heads(sums, norm))
        dqkv = dout.clone()
        for dx, g, y, mean, scale in zip(_queries_and_keys(dqkv), gs, normalised, means, scales, strict=True):
            dx.copy_((g - y * mean) * scale)
        return dqkv, *dweights, None


def _mean_over_heads(sums: Tensor, norm: QKNorm) -> Tensor:
    """Sum over the ranks that share the heads, for queries and keys at once, and divide by the counts: [T, 2]."""
    sums = norm.communicator.sum_over_heads(sums)
    for column, count in zip(sums.unbind(1), norm.counts, strict=True):
        column.div_(count)  # numbers, of which no tensor has to be copied to a device
    return sums


def _queries_and_keys(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return qkv[:, :, :-2], qkv[:, :, -2:-1]


def _per_token(numbers: Tensor) -> tuple[Tensor, ...]:
    """Return the numbers of queries and of keys as factors of these: [T, 2] → two of [T, 1, 1, 1]."""
    return numbers[:, :, None, None, None].unbind(1)
