"""Communicators of isp, the mode that splits the sequence over the tensor group and weights over the weight group.

A weight is all-gathered for each matmul, and its gradient is reduce-scattered (Chen et al. 2024, arXiv 2401.09149). An
all-to-all before attention changes the split of q, k and v from tokens to heads, and another all-to-all after attention
changes the split of the output from heads to tokens (Jacobs et al. 2023, arXiv 2309.14509).

Shapes: n ranks in the tensor group, T tokens of the whole packed sequence, G kv heads, Q query heads per kv head, D
head dimension, H hidden size, V vocabulary entries, I input and O output features of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import all_gather, all_to_all, exchange, pad_rows, reduce_scatter
from internlm.core.parallel.communicator import (
    AttentionCommunicator,
    Communicator,
    EmbeddingCommunicator,
    HeadCommunicator,
    ModelCommunicator,
)
from internlm.core.parallel.param_state import add_grad
from internlm.core.parallel.weight_gatherer import WeightGatherer
from internlm.utils.torch_private import uncompiled

# -- weights ----------------------------------------------------------------------------------------------------------


class IspLinear(Communicator):
    """Communicator of a linear under isp: all-gather of the weight for each matmul, reduce-scatter of its gradient.

    ``index`` is the index of the linear in the weight gatherer.
    """

    splits_weight = True

    def __init__(self, gatherer: WeightGatherer, index: int) -> None:
        self.gatherer, self.index = gatherer, index

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        """Return the whole weight as a matrix, [O, I], all-gathered now or prefetched."""
        return self.gatherer.acquire(self.index, backward)

    def release_weight(self, whole: Tensor) -> None:
        """Release the buffer of the whole weight."""
        self.gatherer.release(self.index)

    def reduce_grad_weight(self, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Reduce-scatter ``dw``, [O, I], and pass this rank's rows to ``deliver``.

        With overlap enabled, ``deliver`` may be called later: when the next gradient is reduced, or at the end of the
        backward pass.
        """
        return self.gatherer.reduce(self.index, dw, deliver)


class TokensHead(HeadCommunicator):
    """Communicator of a head whose weight is replicated and whose input is split by tokens over the tensor group."""

    def __init__(self, tensor: Group) -> None:
        self.tensor = tensor

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Gather the logits of every rank's tokens: [T / n, V] → [T, V]."""

        # All ranks have the same gradient of the gathered logits, so backward only takes the rows of this rank.
        def slice_own(whole: Tensor) -> Tensor:
            return whole.chunk(self.tensor.size)[self.tensor.rank].contiguous()

        return exchange(logits, lambda x: all_gather(x, self.tensor), slice_own)


class IspHead(IspLinear, TokensHead):
    """Communicator of a head under isp: the weight is split over the weight group, tokens over the tensor group."""

    def __init__(self, gatherer: WeightGatherer, index: int, tensor: Group) -> None:
        IspLinear.__init__(self, gatherer, index)
        TokensHead.__init__(self, tensor)

    @contextmanager
    def weight_for_loss(self, weight: Tensor) -> Iterator[Tensor]:
        """Yield the whole weight, [V, H]; backward reduce-scatters its gradient to this rank's shard."""
        yield _WholeWeight.apply(weight, self)
        # The loss computes its gradients during forward (ops/cross_entropy.py), so backward does not need the weight.
        self.gatherer.release(self.index)


class _WholeWeight(torch.autograd.Function):
    """Autograd function that all-gathers the head's weight, and reduce-scatters its gradient in backward.

    The reduced gradient is added to the main gradient if there is one.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, comm: IspHead) -> Tensor:
        ctx.weight, ctx.comm = weight, comm
        whole = comm.gather_weight(weight)
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, None]:
        return ctx.comm.reduce_grad_weight(dw, lambda shard: add_grad(ctx.weight, shard)), None


class IspEmbedding(EmbeddingCommunicator):
    """Communicator of an embedding under isp: all-gather of the table, reduce-scatter of its gradient."""

    def __init__(self, group: Group, vocab_size: int) -> None:
        self.group, self.vocab_size = group, vocab_size

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """All-gather the table and look up this rank's tokens: [T / n] → [T / n, H]."""
        return lookup(ids, exchange(weight, self._gather, self._reduce))

    def _gather(self, weight: Tensor) -> Tensor:
        return all_gather(weight, self.group)[: self.vocab_size]  # the last rows may be padding

    def _reduce(self, dw: Tensor) -> Tensor:
        return reduce_scatter(pad_rows(dw, self.group), self.group)


# -- attention and positions ------------------------------------------------------------------------------------------


class IspAttention(AttentionCommunicator):
    """Communicator of attention under isp: all-to-alls between tokens and heads (arXiv 2309.14509).

    If there are fewer kv heads than ranks, each kv head is sent to all ranks that hold some of its query heads. The
    function ``before``, called before the first all-to-all, may launch the all-gathers of the next block.
    """

    def __init__(self, group: Group, before: Callable[[], None]) -> None:
        self.group, self.before = group, before

    @uncompiled("ranks exchange tokens and heads")
    def to_heads(self, qkv: Tensor) -> Tensor:
        """Redistribute q, k and v by an all-to-all, so that this rank holds its own heads of all tokens.

        Args:
            qkv: Fused q, k and v, [T / n, G, Q + 2, D].

        Returns:
            Fused q, k and v of this rank's heads, [T, kv heads of this rank, query heads per kv head + 2, D].
        """
        self.before()
        tokens, kv_heads, dim = qkv.shape[0], qkv.shape[1], qkv.shape[3]
        repeats = max(self.group.size // kv_heads, 1)
        groups = max(kv_heads // self.group.size, 1)  # kv heads of each rank

        def to_heads(qkv: Tensor) -> Tensor:
            slices = _repeat_kv_heads(qkv, repeats).view(qkv.shape[0], self.group.size, -1)
            received = all_to_all(slices.transpose(0, 1).contiguous(), self.group)  # [n, T / n, heads · D]
            return received.view(qkv.shape[0] * self.group.size, groups, -1, dim)

        def to_tokens(dqkv: Tensor) -> Tensor:
            received = all_to_all(dqkv.reshape(self.group.size, tokens, -1), self.group)
            return _sum_kv_heads(received.transpose(0, 1).reshape(tokens, kv_heads, repeats, -1, dim))

        return exchange(qkv, to_heads, to_tokens)

    @uncompiled("ranks exchange tokens and heads")
    def to_tokens(self, heads: Tensor) -> Tensor:
        """Redistribute the attention output by an all-to-all, so that this rank holds all heads of its own tokens.

        [T, query heads of this rank · D] → [T / n, G · Q · D].
        """
        tokens = heads.shape[0] // self.group.size

        def to_tokens(heads: Tensor) -> Tensor:
            return all_to_all(heads.view(self.group.size, tokens, -1), self.group).transpose(0, 1).flatten(1)

        def to_heads(dheads: Tensor) -> Tensor:
            slices = dheads.view(tokens, self.group.size, -1).transpose(0, 1).contiguous()
            return all_to_all(slices, self.group).flatten(0, 1)

        return exchange(heads, to_tokens, to_heads)


def _repeat_kv_heads(qkv: Tensor, repeats: int) -> Tensor:
    """Repeat each kv head r = ``repeats`` times and divide its query heads among the copies.

    [T, G, Q + 2, D] → [T, G · r, Q / r + 2, D].
    """
    if repeats == 1:
        return qkv
    queries = qkv[:, :, :-2].unflatten(2, (repeats, -1))
    keys_values = qkv[:, :, None, -2:].expand(-1, -1, repeats, -1, -1)
    return torch.cat([queries, keys_values], 3).flatten(1, 2)


def _sum_kv_heads(dqkv: Tensor) -> Tensor:
    """Sum the gradients of the copies of each kv head: the backward of :func:`_repeat_kv_heads`.

    The gradients of the query heads, which were divided among the copies, are concatenated.

    [T, G, r, Q / r + 2, D] → [T, G, Q + 2, D].
    """
    if dqkv.shape[2] == 1:
        return dqkv.squeeze(2)
    return torch.cat([dqkv[:, :, :, :-2].flatten(2, 3), dqkv[:, :, :, -2:].sum(2)], 2)


class IspModel(ModelCommunicator):
    """Communicator of a model under isp: gathers the token positions of the whole sequence for attention."""

    def __init__(self, group: Group) -> None:
        self.group, self.token_multiple = group, group.size

    def input_tokens(self, row: Tensor) -> Tensor:
        """Return this rank's tokens of a row: [T] → [T / n]."""
        return row.chunk(self.group.size)[self.group.rank]

    def whole_tokens(self, x: Tensor) -> Tensor:
        """All-gather the sequence: [T / n, H] → [T, H]."""
        return all_gather(x, self.group)

    def whole_positions(self, positions: Tensor) -> Tensor:
        """Gather the positions of every rank's tokens: [T / n] → [T]."""
        return all_gather(positions, self.group)
