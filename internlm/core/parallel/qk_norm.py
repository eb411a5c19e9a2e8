"""Normalisation of queries and keys before rotary embedding (QK-norm, Dehghani et al. 2023, arXiv 2302.05442).

Shapes: T tokens, G kv heads, Q query heads per kv head, D head dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from internlm.core.parallel.communicator import IDENTITY_HEADS, HeadsCommunicator
from internlm.core.parallel.param_state import place
from internlm.core.parallel.placement import constant
from internlm.core.parallel.sharding import current_sharding
from internlm.ops import rms_norm
from internlm.utils.dtype import wide


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
        q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), 2)
        if self.scope == "head":
            q, k = (rms_norm(x, w, self.eps, self.offset) for x, w in ((q, self.q_weight), (k, self.k_weight)))
        else:
            q, k = self._normalise_together(q, k)
        return torch.cat((q, k, v), 2)

    def _normalise_together(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise all queries of a token, and all its keys: [T, G, Q, D], [T, G, 1, D] → the same."""
        width = wide(q.dtype)
        # One sum over the ranks for both.
        sums = torch.stack([x.to(width).square().sum((1, 2, 3)) for x in (q, k)], 1)  # [T, 2]
        means = self.communicator.sum_over_heads(sums) / sums.new_tensor(self.counts)
        inverse = (means + self.eps).rsqrt()[:, :, None, None, None]  # [T, 2, 1, 1, 1]
        weights = (self.q_weight + self.offset, self.k_weight + self.offset)
        q, k = (
            (x.to(width) * scale * weight).to(x.dtype)
            for x, scale, weight in zip((q, k), inverse.unbind(1), weights, strict=True)
        )
        return q, k
