"""isp: the sequence is split over the tensor group throughout, every weight over the weight group.

A weight is gathered when a product needs it, and its gradient reduce-scattered; around attention an all-to-all turns
tokens into heads and back (Jacobs et al. 2023, arXiv 2309.14509; Chen et al. 2024, arXiv 2401.09149).

Shapes: n ranks in the tensor group, T tokens of the whole row, G kv heads, Q query heads per kv head, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import all_gather, all_to_all, exchange, reduce_scatter
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


class IspLinear(Communicator):
    """All-gather of the weight forward and backward, reduce-scatter of its gradient. ``number`` is the place of the
    linear in the order in which they run."""

    splits_weight = True

    def __init__(self, gatherer: WeightGatherer, number: int) -> None:
        self.gatherer, self.number = gatherer, number

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        return self.gatherer.take(self.number, backward)

    def release_weight(self, whole: Tensor) -> None:
        self.gatherer.release(self.number)

    def reduce_grad_weight(self, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        return self.gatherer.reduce(self.number, dw, deliver)


class TokensHead(HeadCommunicator):
    """A head that is whole on each rank, which has the logits of its own tokens."""

    def __init__(self, tensor: Group) -> None:
        self.tensor = tensor

    def whole_logits(self, logits: Tensor) -> Tensor:
        def own(whole: Tensor) -> Tensor:
            return whole.chunk(self.tensor.size)[self.tensor.rank].contiguous()

        return exchange(logits, lambda x: all_gather(x, self.tensor), own)


class IspHead(IspLinear, TokensHead):
    """The same, the weight gathered."""

    def __init__(self, gatherer: WeightGatherer, number: int, tensor: Group) -> None:
        IspLinear.__init__(self, gatherer, number)
        TokensHead.__init__(self, tensor)

    @contextmanager
    def weight_for_loss(self, weight: Tensor) -> Iterator[Tensor]:
        yield _WholeWeight.apply(weight, self)
        self.gatherer.release(self.number)


class _WholeWeight(torch.autograd.Function):
    """The weight as the loss needs it: whole, with a gradient that is reduced to this rank's part."""

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
    """The table is gathered for a look-up, and its gradient reduce-scattered."""

    def __init__(self, group: Group, words: int) -> None:
        self.group, self.words = group, words

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        whole = exchange(weight, self._gather, self._reduce)
        return lookup(ids, whole)

    def _gather(self, weight: Tensor) -> Tensor:
        return all_gather(weight, self.group)[: self.words]

    def _reduce(self, dw: Tensor) -> Tensor:
        return reduce_scatter(F.pad(dw, (0, 0, 0, -self.words % self.group.size)), self.group)


class IspAttention(AttentionCommunicator):
    """All-to-all between tokens and heads. Where there are fewer kv heads than ranks, each is sent to all ranks that
    hold some of its query heads."""

    def __init__(self, group: Group, before: Callable[[], None]) -> None:
        self.group, self.before = group, before

    @uncompiled("ranks exchange tokens and heads")
    def to_heads(self, qkv: Tensor) -> Tensor:
        self.before()
        tokens, kv_heads, dim = qkv.shape[0], qkv.shape[1], qkv.shape[3]
        repeats = max(self.group.size // kv_heads, 1)
        groups = max(kv_heads // self.group.size, 1)  # on each rank

        def there(qkv: Tensor) -> Tensor:
            parts = _for_each_rank(qkv, repeats).view(qkv.shape[0], self.group.size, -1)
            received = all_to_all(parts.transpose(0, 1).contiguous(), self.group)  # [n, T / n, heads · D]
            return received.view(qkv.shape[0] * self.group.size, groups, -1, dim)

        def back(dqkv: Tensor) -> Tensor:
            parts = all_to_all(dqkv.reshape(self.group.size, tokens, -1), self.group)
            return _from_each_rank(parts.transpose(0, 1).reshape(tokens, kv_heads, repeats, -1, dim))

        return exchange(qkv, there, back)

    @uncompiled("ranks exchange tokens and heads")
    def to_tokens(self, heads: Tensor) -> Tensor:
        tokens = heads.shape[0] // self.group.size

        def there(heads: Tensor) -> Tensor:
            return all_to_all(heads.view(self.group.size, tokens, -1), self.group).transpose(0, 1).flatten(1)

        def back(dheads: Tensor) -> Tensor:
            parts = dheads.view(tokens, self.group.size, -1).transpose(0, 1).contiguous()
            return all_to_all(parts, self.group).flatten(0, 1)

        return exchange(heads, there, back)


def _for_each_rank(qkv: Tensor, repeats: int) -> Tensor:
    """[T, G, Q + 2, D] to [T, G · repeats, Q / repeats + 2, D]: each kv head beside a part of its query heads."""
    if repeats == 1:
        return qkv
    queries = qkv[:, :, :-2].unflatten(2, (repeats, -1))
    keys_values = qkv[:, :, None, -2:].expand(-1, -1, repeats, -1, -1)
    return torch.cat([queries, keys_values], 3).flatten(1, 2)


def _from_each_rank(dqkv: Tensor) -> Tensor:
    """The inverse, [T, G, repeats, Q / repeats + 2, D] to [T, G, Q + 2, D]: gradients of a kv head are summed."""
    if dqkv.shape[2] == 1:
        return dqkv.squeeze(2)
    return torch.cat([dqkv[:, :, :, :-2].flatten(2, 3), dqkv[:, :, :, -2:].sum(2)], 2)


class IspModel(ModelCommunicator):
    """Attention sees the whole row, so it needs the positions of all its tokens."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def whole_positions(self, positions: Tensor) -> Tensor:
        return all_gather(positions, self.group)
