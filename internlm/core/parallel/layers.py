"""Embedding, norms and head, with placements. Shapes: T tokens, H hidden, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.parallel.communicator import (
    IDENTITY_EMBEDDING,
    IDENTITY_HEAD,
    EmbeddingCommunicator,
    HeadCommunicator,
)
from internlm.core.parallel.linear import ParallelLinear
from internlm.core.parallel.param_state import main_grad_of, place, wait_for_all_gather
from internlm.core.parallel.placement import Init, constant, normal
from internlm.core.parallel.sharding import current_sharding
from internlm.ops import LossOptions, TokenLoss, layer_norm, linear_cross_entropy, rms_norm


class ParallelEmbedding(nn.Module):
    """Token ids to vectors; ``grad_scale`` scales the gradient of the table (GLM-130B, arXiv 2210.02414, section
    3.1). Tensor parallel modes split the table over its words, or, with ``split_hidden``, over hidden units."""

    role = "embedding"
    communicator: EmbeddingCommunicator = IDENTITY_EMBEDDING

    def __init__(
        self, vocab_size: int, hidden_size: int, std: float, grad_scale: float = 1.0, split_hidden: bool = False
    ) -> None:
        super().__init__()
        role = "embedding by hidden units" if split_hidden else "embedding"
        self.weight = place(current_sharding().weight_of(role, (vocab_size, hidden_size), normal(std)))
        self.grad_scale = grad_scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [T] → [tokens of this rank, H]."""
        x = self.communicator.embed(ids, self.weight, F.embedding)  # indexing is not deterministic in backward
        return x if self.grad_scale == 1.0 else torch.lerp(x.detach(), x, self.grad_scale)


class ParallelNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the hidden dimension."""

    def __init__(self, hidden_size: int, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        sharding = current_sharding()
        self.weight = place(sharding.replicated((hidden_size,), constant(1.0)))
        has_bias = kind == "layernorm"
        self.bias = place(sharding.replicated((hidden_size,), constant(0.0))) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H] → [T, H]."""
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class ParallelHead(ParallelLinear):
    """Hidden units to logits, or, given labels, to the loss of each token without ever holding all logits."""

    communicator: HeadCommunicator = IDENTITY_HEAD

    def __init__(self, hidden_size: int, vocab_size: int, init: Init, parallel_output: bool = True) -> None:
        super().__init__(hidden_size, vocab_size, init, role="head")
        self.parallel_output = parallel_output

    def logits(self, x: Tensor) -> Tensor:
        """x: [tokens of this rank, H] → what this rank computes of the logits; with ``parallel_output`` False, those of
        every token for every word."""
        comm = self.communicator
        return (comm.real_logits if self.parallel_output else comm.whole_logits)(self(x))

    def loss(self, x: Tensor, labels: Tensor, label_smoothing: float = 0.0, grad_scale: float = 1.0) -> TokenLoss:
        """x: [tokens of this rank, H] → losses of the labels, [T]."""
        with self.communicator.weight_for_loss(wait_for_all_gather(self.weight)) as weight:
            return linear_cross_entropy(
                self.communicator.enter(x),
                weight,
                labels,
                LossOptions(
                    label_smoothing=label_smoothing,
                    grad_scale=grad_scale,
                    vocab=self.communicator.vocab,
                    main_grad=main_grad_of(weight),
                ),
            )
