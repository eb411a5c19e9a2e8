"""A plain Llama 3 model in torch, block by block as torchtitan's documentation and paper describe it.

It is written from the public description (arXiv 2410.06511; Llama 3, arXiv 2407.21783): separate projections for q, k
and v and for the gate, complex rotary embeddings in float32, torch's own attention, norm, cross entropy, gradient
clipping and fused AdamW. It serves to count operators, not to train.

Shapes: B sequences, L tokens of one, H hidden size, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm.config.schema import ModelConfig


class PlainBlock(nn.Module):
    """Attention and feed-forward block with pre-normalisation."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, inner, self.dim = model.hidden_size, model.intermediate_size, model.head_size
        self.heads, self.kv_heads = model.num_attention_heads, model.kv_heads
        self.wq = nn.Linear(hidden, self.heads * self.dim, bias=False)
        self.wk, self.wv = (nn.Linear(hidden, self.kv_heads * self.dim, bias=False) for _ in range(2))
        self.wo = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.w1, self.w3 = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(hidden, eps=model.layer_norm_epsilon) for _ in range(2))

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Compute the block's output: [B, L, H], [L, D / 2] complex → [B, L, H]."""
        x = x + self._attend(self.attention_norm(x), rotations)
        y = self.ffn_norm(x)
        out: Tensor = x + self.w2(F.silu(self.w1(y)) * self.w3(y))
        return out

    def _attend(self, x: Tensor, rotations: Tensor) -> Tensor:
        q, k, v = (w(x).view(*x.shape[:2], -1, self.dim) for w in (self.wq, self.wk, self.wv))
        q, k = _rotate(q, rotations), _rotate(k, rotations)
        heads = [y.transpose(1, 2) for y in (q, k, v)]  # [B, heads, L, D]
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        attended: Tensor = self.wo(out.transpose(1, 2).contiguous().view(*x.shape[:2], -1))
        return attended


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * rotations[None, :, None]).flatten(3).type_as(x)


class PlainModel(nn.Module):
    """Embedding, blocks, final norm, output projection and mean cross entropy in float32."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.layer_norm_epsilon)
        self.output = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, ids: Tensor, labels: Tensor, rotations: Tensor) -> Tensor:
        """Compute the loss: [B, L], [B, L], [L, D / 2] complex → scalar."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, rotations)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1).float(), labels.flatten(0, 1))
