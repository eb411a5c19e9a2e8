"""What layers say to the other ranks, and when. The classes here say nothing: the layer is whole on each rank.

A parallel mode is a few small subclasses, one for each role, that override the hooks they need. They are attached
per instance of a layer (:mod:`internlm.core.parallel.attach`), so that two models can live in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from internlm.core.parallel.collectives import Pending
from internlm.ops import VocabShard


class Communicator:
    """Of a linear: hooks around its three matrix products. Those that return a :class:`Pending` may be waited for
    later, so that another product runs meanwhile."""

    #: Whether ``gather_weight`` gathers and ``reduce_grad_weight`` reduces to this rank's shard.
    splits_weight = False
    #: Whether the gathered input is kept for backward, rather than gathered again.
    keeps_gathered_input = False

    def output_tokens(self, tokens: int) -> int:
        """How many tokens the output has, for an input of ``tokens``."""
        return tokens

    def gather_input(self, x: Tensor) -> Pending:
        """Before the forward product: the input that the product needs."""
        return Pending(x)

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        """Before the forward product, and before that for the input's gradient: the weight as a matrix, [O, I]."""
        return weight.view(math.prod(weight.shape[:-1]), weight.shape[-1])

    def release_weight(self, whole: Tensor) -> None:
        """After either of them: ``whole``, which :meth:`gather_weight` gave, is no longer needed."""

    def reduce_output(self, y: Tensor) -> Tensor:
        """After the forward product."""
        return y

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """Before the backward products."""
        return dy

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        """After the product for the input's gradient."""
        return Pending(dx)

    def reduce_grad_weight(self, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """After the product for the weight's gradient, [O, I]: have ``deliver`` take this rank's part, now (and return
        what it returns) or before the backward pass ends."""
        return deliver(dw)


class HeadCommunicator(Communicator):
    """Of the head: a linear that may compute the loss with its product."""

    #: The part of the vocabulary that is held here; None: all of it.
    vocab: VocabShard | None = None

    def enter(self, x: Tensor) -> Tensor:
        """The input of the loss, differentiably: [tokens of this rank, H] to [tokens of the labels, H]."""
        return x

    @contextmanager
    def weight_for_loss(self, weight: Tensor) -> Iterator[Tensor]:
        """The weight that the loss needs, differentiably; no longer needed after the block."""
        yield weight

    def whole_logits(self, logits: Tensor) -> Tensor:
        """The logits of every token for every word, from what this rank has of them."""
        return logits

    def real_logits(self, logits: Tensor) -> Tensor:
        """``logits`` without those of padding."""
        return logits


class EmbeddingCommunicator:
    """Of the embedding."""

    def embed(self, ids: Tensor, weight: Tensor, lookup: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The rows of the whole table for the ids, as the first layer wants them: [T] to [tokens of this rank, H]."""
        return lookup(ids, weight)


class AttentionCommunicator:
    """Of attention, between its linears and its kernel."""

    def to_heads(self, qkv: Tensor) -> Tensor:
        """From all heads of this rank's tokens to all tokens of this rank's heads: [T, G, Q + 2, D]."""
        return qkv

    def to_tokens(self, heads: Tensor) -> Tensor:
        """And back: [T, N · D]."""
        return heads


class ModelCommunicator:
    """Of a model as a whole."""

    def whole_positions(self, positions: Tensor) -> Tensor:
        """The positions of all tokens that attention sees, from those of this rank's tokens: [T]."""
        return positions

    def tokens_between_layers(self, tokens: int) -> int:
        """How many this rank has between the layers, of those that the loader gives it."""
        return tokens


#: Layers start with these.
IDENTITY = Communicator()
IDENTITY_HEAD = HeadCommunicator()
IDENTITY_EMBEDDING = EmbeddingCommunicator()
IDENTITY_ATTENTION = AttentionCommunicator()
IDENTITY_MODEL = ModelCommunicator()
