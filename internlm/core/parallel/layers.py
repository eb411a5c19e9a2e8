"""Parallel embedding, norm and head.

Shapes: T tokens, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.config.schema.model import NormType
from internlm.core.parallel.communicator import (
    IDENTITY_EMBEDDING,
    IDENTITY_HEAD,
    Communicator,
    EmbeddingCommunicator,
    HeadCommunicator,
)
from internlm.core.parallel.linear import ParallelLinear
from internlm.core.parallel.param_state import add_grad, begin_accumulation, main_grad_of, place, wait_for_all_gather
from internlm.core.parallel.placement import Init, constant, normal
from internlm.core.parallel.qk_norm import QKNorm
from internlm.core.parallel.sharding import current_sharding
from internlm.ops import LossOptions, TokenLoss, gemm, layer_norm, linear_cross_entropy, rms_norm
from internlm.ops.cpu.packed_weights import packed_linear
from internlm.utils.dtype import wide


class ParallelEmbedding(nn.Module):
    """Embedding layer whose table of token vectors, [V, H], may be split over ranks.

    Args:
        vocab_size: Number of vocabulary entries, V.
        hidden_size: Hidden size, H.
        std: Standard deviation of the initial values.
        grad_scale: Factor that scales the table's gradient, for stability (GLM-130B, arXiv 2210.02414, section 3.1).
        split_hidden: Whether mtp, msp and fsp split the table along H rather than V.
    """

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
        """Look up ``ids``: [T] → [tokens of this rank, H]."""
        # F.embedding and not weight[ids], whose backward pass is not deterministic on CUDA.
        x = self.communicator.embed(ids, self.weight, F.embedding)
        # The value is x for any scale; the gradient flows through the second argument only.
        return x if self.grad_scale == 1.0 else torch.lerp(x.detach(), x, self.grad_scale)


class ParallelNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the hidden dimension.

    Its parameters are replicated on all ranks.

    Args:
        hidden_size: Hidden size, H.
        norm_type: Kind of norm.
        eps: Epsilon, added to the variance or the mean square.
        offset: Number added to the weight.
        dtype: Dtype of the output; None: that of the input.
    """

    def __init__(
        self,
        hidden_size: int,
        norm_type: NormType,
        eps: float,
        offset: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_type, self.eps, self.offset, self.dtype = norm_type, eps, offset, dtype
        sharding = current_sharding()
        self.weight = place(sharding.replicated((hidden_size,), constant(1 - offset)))
        has_bias = norm_type == "layernorm"
        self.bias = place(sharding.replicated((hidden_size,), constant(0.0))) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token: [T, H] → [T, H]."""
        if self.norm_type == "rmsnorm":
            y = rms_norm(x, self.weight, self.eps, self.offset)
        else:
            y = layer_norm(x, self.weight + self.offset if self.offset else self.weight, self.bias, self.eps)
        return y if self.dtype is None else y.to(self.dtype)


def widen_norms(model: nn.Module) -> None:
    """Convert norm weights to at least float32, whatever the dtype of the other parameters."""
    for module in model.modules():
        if isinstance(module, (ParallelNorm, QKNorm)):
            for parameter in module.parameters():
                # Not module.to, which replaces fake parameters and so loses their placement.
                parameter.data = parameter.data.to(wide(parameter.dtype))


class ParallelHead(ParallelLinear):
    """Output head that computes logits (:meth:`logits`) or token losses (:meth:`loss`) from hidden states.

    The loss is computed in chunks of tokens, so that the logits of all tokens never exist at once.

    Args:
        hidden_size: Hidden size, H.
        vocab_size: Number of vocabulary entries, V.
        init: Distribution of the initial values.
        parallel_output: Whether :meth:`logits` returns only the logits of this rank's vocabulary shard. False: it
            gathers the logits of all ranks.
        normalises: Whether each row of the weight is divided by its length (NormHead of Baichuan 2, arXiv 2309.10305,
            section 2.3).
    """

    communicator: HeadCommunicator = IDENTITY_HEAD
    #: Methods that are called instead of ``forward``, so that hooks do not see them.
    entry_points: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(
        self, hidden_size: int, vocab_size: int, init: Init, parallel_output: bool = True, normalises: bool = False
    ) -> None:
        super().__init__(hidden_size, vocab_size, init, role="head")
        self.parallel_output, self.normalises = parallel_output, normalises

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits of ``x``, [tokens of this rank, H].

        Returns:
            [tokens, vocabulary entries of this rank] if ``parallel_output``, else [T, V], gathered from all ranks.
        """
        comm = self.communicator
        own = F.linear(comm.enter(x), self._normalised_weight()) if self.normalises else self(x)
        return (comm.real_logits if self.parallel_output else comm.whole_logits)(own)

    def logits_of_whole(self, x: Tensor, normalised: Tensor | None = None) -> Tensor:
        """Compute all logits of hidden states that every rank holds, without a gradient: [T, H] → [T, V].

        Args:
            x: Hidden states, [T, H].
            normalised: Result of :meth:`normalised_weight`, which is computed if it is None and needed.
        """
        with self._weight_for_loss() if normalised is None else nullcontext(normalised) as weight:
            own = packed_linear(x, weight)
            own = gemm.linear(x, weight) if own is None else own
        # Ranks that split tokens, but not the vocabulary, have all logits already.
        return own if self.communicator.vocab is None else self.communicator.whole_logits(own)

    def loss(
        self, x: Tensor, labels: Tensor, label_smoothing: float = 0.0, grad_scale: Tensor | float = 1.0
    ) -> TokenLoss:
        """Compute the cross entropy of the logits of ``x`` against ``labels``, as a sum and per token.

        Args:
            x: Hidden states, [tokens of this rank, H].
            labels: Labels, int64 [tokens whose loss this rank computes]; −100 is ignored.
            label_smoothing: Probability mass of the target that is spread evenly over the vocabulary.
            grad_scale: Factor that scales the sum of the losses, and hence the gradient; a scalar on the device, or a
                number.

        Returns:
            ``loss_sum`` (differentiable scalar, scaled by ``grad_scale``), ``token_loss`` and ``correct`` (one entry
            per label).
        """
        with self._weight_for_loss() as weight:
            return linear_cross_entropy(
                self.communicator.enter(x),
                weight,
                labels,
                LossOptions(
                    label_smoothing=label_smoothing,
                    grad_scale=grad_scale,
                    vocab=self.communicator.vocab,
                    main_grad=main_grad_of(weight),
                    # The parameter: a gathered weight has no main gradient, and would stay in memory until backward.
                    adds=partial(begin_accumulation, self.weight),
                ),
            )

    def normalised_weight(self) -> Tensor | None:
        """Return the weight with rows of length 1, [rows of this rank, H]; None if this head does not normalise it."""
        return self._normalised_weight() if self.normalises else None

    @contextmanager
    def _weight_for_loss(self) -> Iterator[Tensor]:
        """Yield the weight whose product with a hidden state is the logits, [rows of this rank, H]."""
        if self.normalises:
            yield self._normalised_weight()
            return
        # This bypasses the module's forward, whose hook would wait for the weight's all-gather.
        with self.communicator.weight_for_loss(wait_for_all_gather(self.weight)) as weight:
            yield weight

    def _normalised_weight(self) -> Tensor:
        weight: Tensor = _NormalisedWeight.apply(wait_for_all_gather(self.weight), self.communicator)
        return weight


class _NormalisedWeight(torch.autograd.Function):
    """Autograd function that gathers a weight if it is split, and divides each of its rows by its length.

    Nothing is saved. Backward reduces the gradient of the result to the rows of this rank first, and then needs only
    these rows of the weight. The gradient is added to the main gradient if there is one.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, comm: Communicator) -> Tensor:
        ctx.weight, ctx.comm = weight, comm
        whole = comm.gather_weight(weight)
        normalised = torch.mul(whole, _inverse_lengths(whole), out=torch.empty_like(whole))
        comm.release_weight(whole)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, None]:
        """Compute dweight = r · (dw - y · (dw · y)) for each row, where y = weight · r and r is 1 / length."""

        def deliver(own: Tensor) -> Tensor | None:
            weight = ctx.weight.view_as(own)
            inverse = _inverse_lengths(weight)
            own = own.to(inverse.dtype)
            along = (own * weight).sum(-1, keepdim=True) * inverse.square()
            return add_grad(ctx.weight, torch.addcmul(own, weight, along, value=-1).mul_(inverse))

        return ctx.comm.reduce_grad_weight(dw, deliver), None


def _inverse_lengths(weight: Tensor) -> Tensor:
    """Return 1 / length of each row: [V, H] → [V, 1]. Rows of padding have length 0, and stay 0."""
    lengths = torch.linalg.vector_norm(weight, dim=-1, keepdim=True, dtype=wide(weight.dtype))
    return lengths.clamp_min_(1e-12).reciprocal_()
