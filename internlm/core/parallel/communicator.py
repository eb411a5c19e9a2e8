"""Communicators: hooks that exchange tensors with other ranks before and after a layer's computation.

The classes here are the identity (no-op) communicators, for layers that are not split over ranks. A tensor mode is
implemented by small subclasses, one for each role of a layer, that override the hooks they need. A communicator is
attached to each layer (:mod:`internlm.core.parallel.attach`), so models with different layouts can coexist in one
process.

Shapes: T tokens of this rank, P tokens in the matmuls (T unless a hook gathers tokens), I input and O output features
of the matmuls, H hidden size, V vocabulary entries, G kv heads, Q query heads per kv head, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from internlm.core.parallel.collectives import Pending
from internlm.ops import VocabShard


class Communicator:
    """Communicator of a linear: hooks around its three matmuls (output, dx and dw).

    A hook that returns a :class:`Pending` only starts a collective. The linear waits for the result as late as
    possible, so that the collective overlaps with another matmul.
    """

    #: Whether each rank holds a shard of the weight that is all-gathered for the matmuls, as under isp.
    splits_weight = False
    #: Whether the gathered input is saved for backward. False: backward gathers the input again.
    keeps_gathered_input = False

    def output_tokens(self, tokens: int) -> int:
        """Return the number of tokens in the layer's output if its input has ``tokens`` tokens."""
        return tokens

    def gather_input(self, x: Tensor) -> Pending:
        """Start gathering the input of the forward matmul: [T, I] → [P, I]."""
        return Pending(x)

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        """Return the weight as a matrix for a matmul, [O, I]; all-gather it first if ``splits_weight`` is True.

        Args:
            weight: Weight of the layer, as this rank holds it.
            backward: True for the matmul that computes dx, False for the forward matmul.
        """
        return weight.view(math.prod(weight.shape[:-1]), weight.shape[-1])

    def release_weight(self, whole: Tensor) -> None:
        """Release the matrix returned by :meth:`gather_weight` after its matmul."""

    def reduce_output(self, y: Tensor) -> Tensor:
        """Reduce the result of the forward matmul to the output of the layer: [P, O] → [T, O]."""
        return y

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """Gather the gradient of the output for the backward matmuls: [T, O] → [P, O]."""
        return dy

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start reducing the result of the dx matmul to the gradient of the layer's input: [P, I] → [T, I]."""
        return Pending(dx)

    def reduce_grad_weight(self, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Reduce the gradient of the weight to this rank's shard and pass the shard to ``deliver``.

        Args:
            dw: Gradient of the weight matrix, [O, I].
            deliver: Function that adds the shard to the main gradient, or returns it if there is no main gradient.

        Returns:
            The result of ``deliver``, or None if ``deliver`` is called later, by the end of the backward pass.
        """
        return deliver(dw)


class HeadCommunicator(Communicator):
    """Communicator of the head: the linear that computes the logits or, as a fused linear cross-entropy, the loss."""

    #: Shard of the vocabulary that this rank holds; None: the whole vocabulary.
    vocab: VocabShard | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Return the hidden states for which this rank computes the loss: [T, H] → [number of labels, H].

        The result is differentiable with respect to ``x``.
        """
        return x

    @contextmanager
    def weight_for_loss(self, weight: Tensor) -> Iterator[Tensor]:
        """Yield the weight for the loss, [V, H], as a differentiable function of ``weight``; release it on exit."""
        yield weight

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Gather the logits of all ranks and drop padding: [T, V of this rank] → [tokens of all ranks, V]."""
        return logits

    def real_logits(self, logits: Tensor) -> Tensor:
        """Drop the columns of vocabulary padding from this rank's logits, [T, V of this rank]."""
        return logits


class EmbeddingCommunicator:
    """Communicator of the embedding: a hook around the table look-up."""

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Look up the embeddings of ``ids`` and redistribute them over ranks as the first layer expects.

        Args:
            ids: Token ids, [T].
            weight: Embedding table, as this rank holds it.
            lookup: Function from (ids, table) to embeddings, [T, columns of the table].

        Returns:
            Hidden states, [tokens of this rank between layers, H].
        """
        return lookup(ids, weight)


class AttentionCommunicator:
    """Communicator of attention: hooks before and after the attention kernel."""

    def to_heads(self, qkv: Tensor) -> Tensor:
        """Redistribute q, k and v by an all-to-all, so that this rank holds its own heads of all tokens.

        Args:
            qkv: Fused q, k and v, [T, G, Q + 2, D].

        Returns:
            Fused q, k and v of this rank's heads, [tokens of all ranks, kv heads of this rank, query heads per kv
            head + 2, D].
        """
        return qkv

    def to_tokens(self, heads: Tensor) -> Tensor:
        """Redistribute the attention output by an all-to-all, so that this rank holds all heads of its own tokens.

        Args:
            heads: Attention output, [tokens of all ranks, query heads of this rank · D].

        Returns:
            Attention output of this rank's tokens, [T, G · Q · D].
        """
        return heads


class HeadsCommunicator:
    """Communicator of a norm over all heads of a token: a hook for sums over heads that other ranks hold."""

    def sum_over_heads(self, sums: Tensor) -> Tensor:
        """Sum over the ranks that share the heads of each token, possibly in place: [T, n] → [T, n]."""
        return sums


class ModelCommunicator:
    """Communicator of a model: hooks that belong to no single layer."""

    def whole_positions(self, positions: Tensor) -> Tensor:
        """Gather the positions of all tokens that attention reads: [T] → [tokens in attention]."""
        return positions

    def tokens_between_layers(self, tokens: int) -> int:
        """Return the number of tokens that this rank holds between layers if its loader yields ``tokens`` tokens."""
        return tokens

    #: Number by which the number of tokens of a row must be divisible.
    token_multiple = 1

    def input_tokens(self, row: Tensor) -> Tensor:
        """Return what this rank's loader yields of a row of tokens: [tokens of all ranks] → [T]."""
        return row

    def whole_tokens(self, x: Tensor) -> Tensor:
        """Gather the hidden states of all tokens, without a gradient: [T, H] → [tokens of all ranks, H]."""
        return x


#: No-op communicators, the defaults of the layers.
IDENTITY = Communicator()
IDENTITY_HEAD = HeadCommunicator()
IDENTITY_EMBEDDING = EmbeddingCommunicator()
IDENTITY_ATTENTION = AttentionCommunicator()
IDENTITY_HEADS = HeadsCommunicator()
IDENTITY_MODEL = ModelCommunicator()
