"""mtp: tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Activations between the linears are
whole on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import Pending, all_gather, all_reduce, begin_all_reduce
from internlm.core.parallel.communicator import Communicator, EmbeddingCommunicator, HeadCommunicator
from internlm.core.parallel.exchange import exchange
from internlm.core.parallel.placement import ParamPlacement


class MtpColumn(Communicator):
    """Identity forward, all-reduce of the input's gradient backward."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return begin_all_reduce(dx, self.group)


class MtpRow(Communicator):
    """All-reduce of the output forward, identity backward."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def reduce_output(self, y: Tensor) -> Tensor:
        return all_reduce(y, self.group)


class SplitVocab:
    """The rows of a [V, H] weight that this rank holds, as the loss asks for them."""

    def __init__(self, group: Group, placement: ParamPlacement) -> None:
        self.group = group
        rows, self.total = placement.local_shape[0], placement.global_shape[0]
        self.first = min(group.rank * rows, self.total)
        self.columns = min(self.first + rows, self.total) - self.first

    def max_(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.group, dist.ReduceOp.MAX)

    def sum_(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.group)


class SplitHead(HeadCommunicator):
    """A head split over the vocabulary, whose input is whole."""

    def __init__(self, group: Group, placement: ParamPlacement) -> None:
        self.group = group
        self.vocab = self._part = SplitVocab(group, placement)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return begin_all_reduce(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        return exchange(x, lambda x: x, lambda dx: all_reduce(dx, self.group))

    def whole_logits(self, logits: Tensor) -> Tensor:
        shape = logits.shape

        def gather(part: Tensor) -> Tensor:
            return _side_by_side(part, self.group)[:, : self._part.total]

        def own(whole: Tensor) -> Tensor:
            part = whole.new_zeros(shape)
            part[:, : self._part.columns] = whole[:, self._part.first : self._part.first + self._part.columns]
            return part

        return exchange(logits, gather, own)

    def real_logits(self, logits: Tensor) -> Tensor:
        return logits[:, : self._part.columns]


class VocabEmbedding(EmbeddingCommunicator):
    """An embedding split over the vocabulary: each rank looks up its own words, ``combine`` sums over the ranks."""

    def __init__(self, group: Group, placement: ParamPlacement, combine: Callable[[Tensor, Group], Tensor]) -> None:
        self.group, self.combine = group, combine
        self.first = group.rank * placement.local_shape[0]

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        own = ids - self.first
        elsewhere = (own < 0) | (own >= weight.shape[0])
        x = lookup(own.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[:, None], 0.0)
        return self.combine(x, self.group)


class HiddenEmbedding(EmbeddingCommunicator):
    """An embedding split over the hidden units: ``combine`` puts the parts of each token together."""

    def __init__(self, group: Group, combine: Callable[[Tensor, Group], Tensor]) -> None:
        self.group, self.combine = group, combine

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self.combine(lookup(ids, weight), self.group)


def sum_to_all(x: Tensor, group: Group) -> Tensor:
    """Parts of a sum, [T, H], to the sum on every rank; the gradient is the same on every rank."""
    return exchange(x, lambda x: all_reduce(x, group), lambda dx: dx)


def units_to_all(x: Tensor, group: Group) -> Tensor:
    """Hidden units of this rank, [T, H / n], to all of them, [T, H]; the gradient is the same on every rank."""
    return exchange(x, lambda x: _side_by_side(x, group), lambda dx: dx.chunk(group.size, 1)[group.rank].contiguous())


def _side_by_side(x: Tensor, group: Group) -> Tensor:
    """[T, C] of each rank to [T, n · C]."""
    parts = all_gather(x, group).view(group.size, *x.shape)  # [n, T, C]
    return torch.cat(parts.unbind(0), 1)
