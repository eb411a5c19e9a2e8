"""mtp: tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Activations between the linears are
whole on every rank.

msp and fsp: tensor parallelism whose activations between the linears are split along the sequence (Korthikanti et
al. 2022, arXiv 2205.05198, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import (
    Pending,
    all_gather,
    all_reduce,
    all_to_all,
    begin_all_gather,
    begin_all_reduce,
    begin_reduce_scatter,
    exchange,
    reduce_scatter,
)
from internlm.core.parallel.communicator import Communicator, EmbeddingCommunicator, HeadCommunicator, ModelCommunicator
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


class FspColumn(Communicator):
    """All-gather of the sequence forward, and again backward, under the product for the input's gradient, which is
    reduce-scattered."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        return tokens * self.group.size

    def gather_input(self, x: Tensor) -> Pending:
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return begin_reduce_scatter(dx, self.group)


class MspColumn(FspColumn):
    """The same, but what forward gathered is kept."""

    keeps_gathered_input = True


class SequenceRow(Communicator):
    """Reduce-scatter of the output forward, all-gather of its gradient backward."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        return tokens // self.group.size

    def reduce_output(self, y: Tensor) -> Tensor:
        return reduce_scatter(y, self.group)

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        return all_gather(dy, self.group)


class SequenceHead(SplitHead):
    """A head split over the vocabulary, whose input is split along the sequence."""

    def gather_input(self, x: Tensor) -> Pending:
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return begin_reduce_scatter(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        return exchange(x, lambda x: all_gather(x, self.group), lambda dx: reduce_scatter(dx, self.group))


class SequenceModel(ModelCommunicator):
    """The loader gives every rank all tokens of a row; between the layers each has its part of them."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def tokens_between_layers(self, tokens: int) -> int:
        return tokens // self.group.size


def sum_to_tokens(x: Tensor, group: Group) -> Tensor:
    """Parts of a sum, [T, H], to the sum for this rank's tokens, [T / n, H]."""
    return exchange(x, lambda x: reduce_scatter(x, group), lambda dx: all_gather(dx, group))


def units_to_tokens(x: Tensor, group: Group) -> Tensor:
    """This rank's hidden units of all tokens, [T, H / n], to all units of this rank's tokens, [T / n, H]."""

    def there(x: Tensor) -> Tensor:
        parts = all_to_all(x.view(group.size, -1, x.shape[1]), group)  # [n, T / n, H / n]
        return parts.transpose(0, 1).flatten(1)

    def back(dx: Tensor) -> Tensor:
        parts = dx.view(dx.shape[0], group.size, -1).transpose(0, 1).contiguous()
        return all_to_all(parts, group).flatten(0, 1)

    return exchange(x, there, back)
