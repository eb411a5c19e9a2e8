"""Attention of one new token for each of several sequences, over the cached keys and values of the earlier ones.

Shapes: B sequences, N query heads, G key/value heads, Q = N / G query heads per group, S slots of the cache, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.utils.torch_private import uncompiled


# Not traced: the number of keys grows with every token, and each change would recompile.
@uncompiled("the number of cached keys changes with every token")
def cached_attention(
    q: Tensor, keys: Tensor, values: Tensor, filled: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """Compute attention of the newest token of each sequence over all keys that its cache holds.

    Keys and values are not expanded to the query heads: the heads of a group are the queries of one matmul.

    Args:
        q: Queries of the newest tokens, [B, N, D].
        keys: Cached keys, in any order and including that of the newest token, [B, G, S, D].
        values: Cached values in the order of the keys, [B, G, S, D].
        filled: Number of slots in use of each sequence, which are its first ones; on the host.
        scale: Factor by which q · kᵀ is multiplied; by default D ** -0.5.

    Returns:
        Attention output, [B, N, D].
    """
    longest = max(filled)
    mask = None
    if min(filled) < longest:
        counts = torch.tensor(filled).to(q.device, non_blocking=True)
        mask = (torch.arange(longest, device=q.device) < counts[:, None])[:, None, None]  # [B, 1, 1, longest]
    grouped = q.unflatten(1, (keys.shape[1], -1))  # [B, G, Q, D]
    out = F.scaled_dot_product_attention(
        grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask, scale=scale
    )
    return out.flatten(1, 2)
