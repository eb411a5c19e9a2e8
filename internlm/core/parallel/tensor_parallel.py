"""Communicators of the modes that split weights over the tensor group.

mtp: tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Activations between the linears are whole
on every rank.

msp and fsp: tensor parallelism with sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2).
Activations between the linears are split along the sequence. msp keeps the gathered input of a column for backward,
fsp gathers it again.

Shapes: n ranks in the tensor group, T tokens of a row, H hidden, V vocabulary.
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

# -- columns and rows -------------------------------------------------------------------------------------------------


class MtpColumn(Communicator):
    """Identity forward, all-reduce of the input's gradient backward (f in arXiv 1909.08053, figure 3)."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start to sum dx: each rank has only the gradient through its own outputs."""
        # It overlaps with the product for the weight's gradient.
        return begin_all_reduce(dx, self.group)


class MtpRow(Communicator):
    """All-reduce of the output forward, identity backward (g in arXiv 1909.08053, figure 3)."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def reduce_output(self, y: Tensor) -> Tensor:
        """Sum the partial products of all ranks, each computed from the rank's own input features."""
        return all_reduce(y, self.group)


class FspColumn(Communicator):
    """All-gather of the sequence forward and again backward, reduce-scatter of the input's gradient.

    The second all-gather overlaps with the product for the input's gradient, which does not need its result.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        """Return the number of tokens after the all-gather."""
        return tokens * self.group.size

    def gather_input(self, x: Tensor) -> Pending:
        """Start to gather the sequence: [T / n, H] → [T, H]."""
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start to sum dx and keep this rank's tokens: [T, H] → [T / n, H]."""
        return begin_reduce_scatter(dx, self.group)


class MspColumn(FspColumn):
    """Column with its input split over the sequence: all-gathered in forward and kept, gradient reduce-scattered."""

    keeps_gathered_input = True


class SequenceRow(Communicator):
    """Reduce-scatter of the output forward, all-gather of its gradient backward."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        """Return the number of tokens after the reduce-scatter."""
        return tokens // self.group.size

    def reduce_output(self, y: Tensor) -> Tensor:
        """Sum the terms of all ranks and keep this rank's tokens: [T, H] → [T / n, H]."""
        return reduce_scatter(y, self.group)

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """Gather the gradient of every token: [T / n, H] → [T, H]."""
        return all_gather(dy, self.group)


# -- head and loss ----------------------------------------------------------------------------------------------------


class SplitVocab:
    """Rows of a [V, H] weight that this rank holds; a :class:`~internlm.ops.VocabShard` for the loss.

    If V is not divisible by the group size, the last rows are padding: ``columns`` counts the logits without padding.
    """

    def __init__(self, group: Group, placement: ParamPlacement) -> None:
        self.group = group
        rows, self.total = placement.local_shape[0], placement.global_shape[0]
        self.first = min(group.rank * rows, self.total)
        self.columns = min(self.first + rows, self.total) - self.first

    def max_(self, x: Tensor) -> Tensor:
        """Take the maximum of ``x`` over the ranks, in place."""
        return all_reduce(x, self.group, dist.ReduceOp.MAX)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks, in place."""
        return all_reduce(x, self.group)


class SplitHead(HeadCommunicator):
    """A head split over the vocabulary, whose input is whole on every rank."""

    def __init__(self, group: Group, placement: ParamPlacement) -> None:
        self.group = group
        self.vocab = self._shard = SplitVocab(group, placement)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start to sum dx: each rank has only the gradient through its own logits."""
        return begin_all_reduce(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        """Return x; backward, sum its gradient over the ranks."""
        return exchange(x, lambda x: x, lambda dx: all_reduce(dx, self.group))

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Gather the logits of every rank and drop the padding: [T, V / n] → [T, V]."""
        shape, shard = logits.shape, self._shard

        def gather(own: Tensor) -> Tensor:
            return _all_gather_columns(own, self.group)[:, : shard.total]

        # Every rank has the same gradient of all logits, so the gradient of its own is a slice, without a collective.
        def slice_own(whole: Tensor) -> Tensor:
            own = whole.new_zeros(shape)
            own[:, : shard.columns] = whole[:, shard.first : shard.first + shard.columns]
            return own

        return exchange(logits, gather, slice_own)

    def real_logits(self, logits: Tensor) -> Tensor:
        """Drop the padding columns."""
        return logits[:, : self._shard.columns]


class SequenceHead(SplitHead):
    """A head split over the vocabulary, whose input is split along the sequence."""

    def gather_input(self, x: Tensor) -> Pending:
        """Start to gather the sequence: [T / n, H] → [T, H]."""
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start to sum dx and keep this rank's tokens: [T, H] → [T / n, H]."""
        return begin_reduce_scatter(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        """Gather the sequence; backward, sum its gradient and keep this rank's tokens: [T / n, H] → [T, H]."""
        return exchange(x, lambda x: all_gather(x, self.group), lambda dx: reduce_scatter(dx, self.group))


# -- embedding --------------------------------------------------------------------------------------------------------


class VocabEmbedding(EmbeddingCommunicator):
    """Communicator of a vocab-parallel embedding: a rank looks up its own entries, ``combine`` sums over ranks."""

    def __init__(self, group: Group, placement: ParamPlacement, combine: Callable[[Tensor, Group], Tensor]) -> None:
        self.group, self.combine = group, combine
        self.first = group.rank * placement.local_shape[0]

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Look up the entries of this rank and combine them with those of the other ranks."""
        own = ids - self.first
        elsewhere = (own < 0) | (own >= weight.shape[0])
        # Zeros for entries of other ranks: exactly one rank adds a vector for each token.
        x = lookup(own.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[:, None], 0.0)
        return self.combine(x, self.group)


class HiddenEmbedding(EmbeddingCommunicator):
    """An embedding split over the hidden size: ``combine`` concatenates the slices of each token."""

    def __init__(self, group: Group, combine: Callable[[Tensor, Group], Tensor]) -> None:
        self.group, self.combine = group, combine

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Look up this rank's slice of every entry and combine it with those of the other ranks."""
        return self.combine(lookup(ids, weight), self.group)


# Functions that combine embeddings, all differentiable. Under mtp the gradient of the result is the same on every rank;
# under msp and fsp each rank has the gradient of its own tokens.


def all_reduce_embedding(x: Tensor, group: Group) -> Tensor:
    """Sum the terms of all ranks on every rank: [T, H] → [T, H]."""
    return exchange(x, lambda x: all_reduce(x, group), lambda dx: dx)


def all_gather_hidden(x: Tensor, group: Group) -> Tensor:
    """Gather the hidden slices of every rank: [T, H / n] → [T, H]."""

    def slice_own(dx: Tensor) -> Tensor:
        return dx.chunk(group.size, 1)[group.rank].contiguous()

    return exchange(x, lambda x: _all_gather_columns(x, group), slice_own)


def reduce_scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """Sum the terms of all ranks and keep this rank's tokens: [T, H] → [T / n, H]."""
    return exchange(x, lambda x: reduce_scatter(x, group), lambda dx: all_gather(dx, group))


def all_to_all_tokens(x: Tensor, group: Group) -> Tensor:
    """Exchange this rank's hidden slice of all tokens for all slices of its own tokens: [T, H / n] → [T / n, H]."""

    def to_tokens(x: Tensor) -> Tensor:
        received = all_to_all(x.view(group.size, -1, x.shape[1]), group)  # [n, T / n, H / n]
        return received.transpose(0, 1).flatten(1)

    def to_hidden(dx: Tensor) -> Tensor:
        slices = dx.view(dx.shape[0], group.size, -1).transpose(0, 1).contiguous()
        return all_to_all(slices, group).flatten(0, 1)

    return exchange(x, to_tokens, to_hidden)


def _all_gather_columns(x: Tensor, group: Group) -> Tensor:
    """Concatenate the columns of every rank: [T, C] → [T, n · C]."""
    gathered = all_gather(x, group).view(group.size, *x.shape)  # [n, T, C]
    return torch.cat(gathered.unbind(0), 1)


# -- model ------------------------------------------------------------------------------------------------------------


class SequenceModel(ModelCommunicator):
    """A model whose ranks load all tokens of a row and hold T / n of them between layers."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def tokens_between_layers(self, tokens: int) -> int:
        """Return the number of tokens a rank holds between layers, T / n."""
        return tokens // self.group.size
