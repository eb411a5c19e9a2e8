"""Communicators: hooks around a layer's computation, which exchange tensors with other ranks.

The classes here are the identity (no-op) communicators, for layers that are whole on each rank. A parallel mode
consists of small subclasses, one per role, that override the hooks they need. Communicators are attached to each layer
of a model (:mod:`internlm.core.parallel.attach`), so models with different layouts can coexist in one process.

Shapes: T tokens of this rank, I input and O output features, H hidden, V vocabulary, G kv heads, Q query heads per kv
head, D head width, N = G · Q heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from internlm.core.parallel.collectives import Pending
from internlm.ops import VocabShard


class Communicator:
    """Hooks around the three matrix products of a linear.

    A returned :class:`Pending` is waited for as late as possible, so that the collective overlaps with another product.
    """

    #: Whether ``gather_weight`` all-gathers and ``reduce_grad_weight`` reduce-scatters to this rank's shard.
    splits_weight = False
    #: Whether the gathered input is saved for backward, rather than gathered again.
    keeps_gathered_input = False

    def output_tokens(self, tokens: int) -> int:
        """Return the number of tokens of the output, for an input of ``tokens``."""
        return tokens

    def gather_input(self, x: Tensor) -> Pending:
        """Start to gather the input of the forward product: [T, I] → [tokens of the product, I]."""
        return Pending(x)

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        """Return the weight as a matrix, [O, I], for the forward product or, with ``backward``, the product for dx."""
        return weight.view(math.prod(weight.shape[:-1]), weight.shape[-1])

    def release_weight(self, whole: Tensor) -> None:
        """Release the result of :meth:`gather_weight`, after either product."""

    def reduce_output(self, y: Tensor) -> Tensor:
        """Reduce the result of the forward product to the output of the layer: [tokens of the product, O] → [T, O]."""
        return y

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """Gather the gradient of the output for the backward products: [T, O] → [tokens of the product, O]."""
        return dy

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """Start to reduce the product for dx to the input's gradient: [tokens of the product, I] → [T, I]."""
        return Pending(dx)

    def reduce_grad_weight(self, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Reduce the product for the weight's gradient and call ``deliver`` with this rank's shard.

        Args:
            dw: Gradient of the whole weight, [O, I].
            deliver: Function that adds the shard to the main gradient, or returns it if there is no main gradient.

        Returns:
            The result of ``deliver``; None: ``deliver`` is called later, at the latest when the backward pass ends.
        """
        return deliver(dw)


class HeadCommunicator(Communicator):
    """Hooks of the head, a linear that may compute the loss together with its product."""

    #: Shard of the vocabulary that this rank holds; None: the whole vocabulary.
    vocab: VocabShard | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Return the input of the loss, differentiably: [T, H] → [tokens of the labels, H]."""
        return x

    @contextmanager
    def weight_for_loss(self, weight: Tensor) -> Iterator[Tensor]:
        """Yield the weight that the loss reads, differentiably, and release it at the end of the block."""
        yield weight

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Gather this rank's logits to those of every token and the whole vocabulary."""
        return logits

    def real_logits(self, logits: Tensor) -> Tensor:
        """Return ``logits`` without the padding columns of the vocabulary."""
        return logits


class EmbeddingCommunicator:
    """Hooks of the embedding."""

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Look up ``ids`` in the whole table, for the first layer: [T] → [tokens between layers, H]."""
        return lookup(ids, weight)


class AttentionCommunicator:
    """Hooks around the attention kernel, between its linears."""

    def to_heads(self, qkv: Tensor) -> Tensor:
        """Exchange all heads of this rank's tokens for all tokens of its heads: [T, G, Q + 2, D]."""
        return qkv

    def to_tokens(self, heads: Tensor) -> Tensor:
        """Exchange all tokens of this rank's heads for all heads of its tokens: [T, N · D]."""
        return heads


class ModelCommunicator:
    """Hooks of the model as a whole."""

    def whole_positions(self, positions: Tensor) -> Tensor:
        """Gather the positions of this rank's tokens to those of all tokens that attention reads: [T]."""
        return positions

    def tokens_between_layers(self, tokens: int) -> int:
        """Return the number of tokens that this rank holds between layers, for ``tokens`` from the loader."""
        return tokens


#: Default communicators of the layers.
IDENTITY = Communicator()
IDENTITY_HEAD = HeadCommunicator()
IDENTITY_EMBEDDING = EmbeddingCommunicator()
IDENTITY_ATTENTION = AttentionCommunicator()
IDENTITY_MODEL = ModelCommunicator()
