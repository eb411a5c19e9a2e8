"""Embedding and norms, with placements. Shapes: T tokens, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.parallel.placement import ParamPlacement, constant, normal, place
from internlm.ops import layer_norm, rms_norm


class ParallelEmbedding(nn.Module):
    """Token ids to vectors; ``grad_scale`` scales the gradient of the table (GLM-130B, arXiv 2210.02414, section
    3.1)."""

    def __init__(self, vocab_size: int, hidden_size: int, std: float, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = place(ParamPlacement((vocab_size, hidden_size), normal(std)))
        self.grad_scale = grad_scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [T] → [T, H]."""
        x = F.embedding(ids, self.weight)  # indexing would do, but is not deterministic in backward
        return x if self.grad_scale == 1.0 else torch.lerp(x.detach(), x, self.grad_scale)


class ParallelNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the hidden dimension."""

    def __init__(self, hidden_size: int, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = place(ParamPlacement((hidden_size,), constant(1.0), is_matrix=False))
        has_bias = kind == "layernorm"
        self.bias = place(ParamPlacement((hidden_size,), constant(0.0), is_matrix=False)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H] → [T, H]."""
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)
