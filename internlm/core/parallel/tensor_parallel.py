"""Communicators of mtp, msp and fsp, the modes that split weights over the tensor group.

mtp: tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3). The residual stream is replicated on all
ranks of the group.

msp and fsp: tensor parallelism with sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2).
The residual stream is split along the sequence. For backward, msp saves the gathered input of a column linear, whereas
fsp gathers it again.

Shapes: n ranks in the tensor group, T tokens of the whole packed sequence, H hidden size, V vocabulary entries.
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
from internlm.core.parallel.communicator import (
    Communicator,
    EmbeddingCommunicator,
    HeadCommunicator,
    HeadsCommunicator,
    ModelCommunicator,
)
from internlm.core.parallel.placement import ParamPlacement

# -- columns and rows -------------------------------------------------------------------------------------------------


class MtpColumn(Communicator):
    """Communicator of a column linear under mtp: identity forward, all-reduce backward.

    This is the operator f of arXiv 1909.08053, figure 3.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start the all-reduce of dx, [T, H]: each rank has only the term from its own output features."""
        # It overlaps with the matmul for the weight's gradient.
        return begin_all_reduce(dx, self.group)


class MtpRow(Communicator):
    """Communicator of a row linear under mtp: all-reduce forward, identity backward.

    This is the operator g of arXiv 1909.08053, figure 3.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def reduce_output(self, y: Tensor) -> Tensor:
        """All-reduce the output, [T, H]: each rank has only the term from its own input features."""
        return all_reduce(y, self.group)


class FspColumn(Communicator):
    """Communicator of a column linear under fsp, whose input is split along the sequence.

    The input is all-gathered in forward and again in backward; its gradient is reduce-scattered. The second all-gather
    overlaps with the matmul that computes dx, which does not use the input.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        """Return the number of output tokens, ``tokens`` times the group size, since the input is all-gathered."""
        return tokens * self.group.size

    def gather_input(self, x: Tensor) -> Pending:
        """Start the all-gather of the sequence: [T / n, H] → [T, H]."""
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start the reduce-scatter of dx along the sequence: [T, H] → [T / n, H]."""
        return begin_reduce_scatter(dx, self.group)


class MspColumn(FspColumn):
    """Communicator of a column linear under msp: all-gathers the input, and saves the gathered input for backward.

    Under fsp, backward gathers the input again instead.
    """

    keeps_gathered_input = True


class SequenceRow(Communicator):
    """Communicator of a row linear under msp and fsp: reduce-scatter of the output, all-gather of its gradient."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        """Return the number of output tokens, ``tokens`` / group size, since the output is reduce-scattered."""
        return tokens // self.group.size

    def reduce_output(self, y: Tensor) -> Tensor:
        """Reduce-scatter the output along the sequence: [T, H] → [T / n, H]."""
        return reduce_scatter(y, self.group)

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """All-gather the gradient of the output along the sequence: [T / n, H] → [T, H]."""
        return all_gather(dy, self.group)


class SplitHeads(HeadsCommunicator):
    """Communicator of a norm over heads that are split over the tensor group."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def sum_over_heads(self, sums: Tensor) -> Tensor:
        """All-reduce the sums, in place."""
        return all_reduce(sums, self.group)


# -- head and loss ----------------------------------------------------------------------------------------------------


class SplitVocab:
    """Vocabulary shard of this rank for the loss (:class:`~internlm.ops.VocabShard`): its rows of a [V, H] weight.

    If V is not divisible by the group size, the last rows are padding, which ``columns`` does not count.
    """

    def __init__(self, group: Group, placement: ParamPlacement) -> None:
        self.group = group
        rows, self.total = placement.local_shape[0], placement.global_shape[0]
        self.first = min(group.rank * rows, self.total)
        self.columns = min(self.first + rows, self.total) - self.first

    def max_(self, x: Tensor) -> Tensor:
        """Take the elementwise maximum of ``x`` over the tensor group, in place."""
        return all_reduce(x, self.group, dist.ReduceOp.MAX)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the tensor group, in place."""
        return all_reduce(x, self.group)


class SplitHead(HeadCommunicator):
    """Communicator of a head split over the vocabulary, whose input is replicated on every rank (mtp)."""

    def __init__(self, group: Group, placement: ParamPlacement) -> None:
        self.group = group
        self.vocab = self._shard = SplitVocab(group, placement)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start the all-reduce of dx, [T, H]: each rank has only the term from its own logits."""
        return begin_all_reduce(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        """Return ``x``, [T, H], unchanged in forward; all-reduce its gradient in backward."""
        return exchange(x, lambda x: x, lambda dx: all_reduce(dx, self.group))

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Gather the logits of every rank and drop the padding: [T, ⌈V / n⌉] → [T, V]."""
        shape, shard = logits.shape, self._shard

        def gather(own: Tensor) -> Tensor:
            return _all_gather_columns(own, self.group)[:, : shard.total]

        # All ranks have the same gradient of the gathered logits, so backward only takes the columns of this rank.
        def slice_own(whole: Tensor) -> Tensor:
            own = whole.new_zeros(shape)
            own[:, : shard.columns] = whole[:, shard.first : shard.first + shard.columns]
            return own

        return exchange(logits, gather, slice_own)

    def real_logits(self, logits: Tensor) -> Tensor:
        """Drop the columns of padding from this rank's logits: [T, ⌈V / n⌉] → [T, columns]."""
        return logits[:, : self._shard.columns]


class SequenceHead(SplitHead):
    """Communicator of a head split over the vocabulary, whose input is split along the sequence (msp and fsp)."""

    def gather_input(self, x: Tensor) -> Pending:
        """Start the all-gather of the sequence: [T / n, H] → [T, H]."""
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start the reduce-scatter of dx along the sequence: [T, H] → [T / n, H]."""
        return begin_reduce_scatter(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        """All-gather the sequence in forward, reduce-scatter its gradient in backward: [T / n, H] → [T, H]."""
        return exchange(x, lambda x: all_gather(x, self.group), lambda dx: reduce_scatter(dx, self.group))


# -- embedding --------------------------------------------------------------------------------------------------------


class VocabEmbedding(EmbeddingCommunicator):
    """Communicator of an embedding split over the vocabulary.

    Each rank looks up the token ids of its shard, with zeros for all others; ``combine`` sums the vectors over ranks.
    """

    def __init__(self, group: Group, placement: ParamPlacement, combine: Callable[[Tensor, Group], Tensor]) -> None:
        self.group, self.combine = group, combine
        self.first = group.rank * placement.local_shape[0]

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Look up ``ids``, [T], in this rank's shard and sum the vectors of all ranks: [T, H] or [T / n, H]."""
        own = ids - self.first
        elsewhere = (own < 0) | (own >= weight.shape[0])
        # Zeros for token ids of other shards: exactly one rank contributes the vector of a token to the sum.
        x = lookup(own.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[:, None], 0.0)
        return self.combine(x, self.group)


class HiddenEmbedding(EmbeddingCommunicator):
    """Communicator of an embedding split over the hidden size; ``combine`` concatenates the columns of all ranks."""

    def __init__(self, group: Group, combine: Callable[[Tensor, Group], Tensor]) -> None:
        self.group, self.combine = group, combine

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Look up ``ids``, [T], in this rank's columns and combine the columns of all ranks: [T, H] or [T / n, H]."""
        return self.combine(lookup(ids, weight), self.group)


# Differentiable functions for the argument ``combine``. Under mtp all ranks have the same gradient of the result; under
# msp and fsp each rank has the gradient of its own tokens.


def all_reduce_embedding(x: Tensor, group: Group) -> Tensor:
    """All-reduce the partial outputs of a vocabulary-parallel embedding, for mtp: [T, H] → [T, H]."""
    return exchange(x, lambda x: all_reduce(x, group), lambda dx: dx)


def all_gather_hidden(x: Tensor, group: Group) -> Tensor:
    """All-gather the output columns of an embedding split over the hidden size, for mtp: [T, H / n] → [T, H]."""

    def slice_own(dx: Tensor) -> Tensor:
        return dx.chunk(group.size, 1)[group.rank].contiguous()

    return exchange(x, lambda x: _all_gather_columns(x, group), slice_own)


def reduce_scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """Reduce-scatter the partial outputs of a vocabulary-parallel embedding, for msp and fsp: [T, H] → [T / n, H]."""
    return exchange(x, lambda x: reduce_scatter(x, group), lambda dx: all_gather(dx, group))


def all_to_all_tokens(x: Tensor, group: Group) -> Tensor:
    """All-to-all, from this rank's columns of all tokens to all columns of this rank's tokens: [T, H / n] → [T / n, H].

    Applied under msp and fsp to the output of an embedding split over the hidden size.
    """

    def to_tokens(x: Tensor) -> Tensor:
        received = all_to_all(x.view(group.size, -1, x.shape[1]), group)  # [n, T / n, H / n]
        return received.transpose(0, 1).flatten(1)

    def to_hidden(dx: Tensor) -> Tensor:
        slices = dx.view(dx.shape[0], group.size, -1).transpose(0, 1).contiguous()
        return all_to_all(slices, group).flatten(0, 1)

    return exchange(x, to_tokens, to_hidden)


def _all_gather_columns(x: Tensor, group: Group) -> Tensor:
    """All-gather columns and concatenate them: [T, C] → [T, n · C], with C columns per rank."""
    gathered = all_gather(x, group).view(group.size, *x.shape)  # [n, T, C]
    return torch.cat(gathered.unbind(0), 1)


# -- model ------------------------------------------------------------------------------------------------------------


class SequenceModel(ModelCommunicator):
    """Communicator of a model under msp and fsp: each rank loads all T tokens and holds T / n between layers."""

    def __init__(self, group: Group) -> None:
        self.group, self.token_multiple = group, group.size

    def tokens_between_layers(self, tokens: int) -> int:
        """Return T / n, the number of tokens that this rank holds between layers, for T = ``tokens``."""
        return tokens // self.group.size

    def whole_tokens(self, x: Tensor) -> Tensor:
        """All-gather the sequence: [T / n, H] → [T, H]."""
        return all_gather(x, self.group)
