"""Dropout whose masks do not depend on the parallel layout.

A mask is a function of the run's seed, the step, the index of the micro-batch in the global batch, the layer and the
position in the layer. A separate generator draws the mask of the whole packed sequence, of which each rank keeps the
part for its own tokens. Hence masks agree across ranks, stages, recomputed blocks and resumed runs, and no generator
state is saved for backward. Megatron instead keeps one random stream per tensor rank.

Shapes: T tokens of the whole packed sequence, S tokens on this rank (T / number of ranks that split the sequence), H
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.core.context.random import derived_seed
from internlm.utils.errors import Problem, UserError
from internlm.utils.torch_private import uncompiled


@dataclass(frozen=True, kw_only=True)
class DropoutKey:
    """Dropout RNG key: a mask is a function of the key, the layer and the position in the layer."""

    seed: int = 0
    data_rank: int = 0
    tensor_rank: int = 0
    """Rank in the tensor group, which may split the sequence."""
    step: int = 0
    micro_num: int = 1
    """Number of micro-batches per rank in this step."""
    micro_index: int = 0
    """Index of the micro-batch among those of this rank."""

    @property
    def micro_batch(self) -> int:
        """Index of the micro-batch in the global batch."""
        return self.data_rank * self.micro_num + self.micro_index


_current: DropoutKey | None = None


@contextmanager
def dropout_key_scope(key: DropoutKey) -> Iterator[None]:
    """Use the dropout masks of ``key`` in forward passes within the ``with`` block."""
    global _current
    outer, _current = _current, key
    try:
        yield
    finally:
        _current = outer


def current_dropout_key() -> DropoutKey:
    """Return the key of the enclosing :func:`dropout_key_scope`.

    Raises:
        UserError: There is no enclosing scope, so step and micro-batch are unknown.
    """
    if _current is None:
        message = "above 0, but the model was called in training mode without a dropout key (step and micro-batch)"
        todo = "Call the model within dropout_key_scope(DropoutKey(...)), or call model.eval() first"
        raise UserError(Problem("model.drop_rate", message, todo))
    return _current


@dataclass(frozen=True)
class Dropout:
    """Dropout (Srivastava et al. 2014; Hinton et al. 2012, arXiv 1207.0580) for one micro-batch.

    Kept elements are divided by 1 − rate, so that the expectation does not change.
    """

    rate: float
    keeps_masks: bool
    """Whether masks are saved for backward, one byte per element, rather than drawn again."""
    key: DropoutKey
    tokens: int
    """Number of tokens of the whole packed sequence, T."""

    def __call__(self, layer: object, position: str, x: Tensor) -> Tensor:
        """Apply dropout to ``x`` with the mask of one position in a layer.

        Args:
            layer: Label of the layer, such as its index.
            position: Name of the position in the layer, such as ``"attention"``.
            x: Tensor of this rank's tokens, [S, H].
        """
        return _drop(self, layer, position, x)

    def mask(self, layer: object, position: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Draw the mask of this rank's tokens, a bool tensor [S, H] that is True for elements to keep."""
        key, (own, width) = self.key, shape
        seed = derived_seed(key.seed, "dropout", key.step, key.micro_batch, layer, position)
        # Draw the whole sequence, then discard the tokens of other ranks: that costs a draw per element, but no memory
        # for backward, and makes the mask independent of the number of ranks that split the sequence.
        whole = torch.empty(self.tokens, width, dtype=torch.bool, device=device)
        whole.bernoulli_(1 - self.rate, generator=torch.Generator(device).manual_seed(seed))
        ranks = self.tokens // own
        return whole if ranks == 1 else whole.chunk(ranks)[key.tensor_rank].clone()


#: Dropout bound to a layer: (position in the layer, ``x``) → ``x`` after dropout.
Drop: TypeAlias = Callable[[str, Tensor], Tensor]


def no_drop(position: str, x: Tensor) -> Tensor:
    """Return ``x`` unchanged: dropout with rate 0."""
    return x


@uncompiled("masks are drawn by generators of their own")
def _drop(dropout: Dropout, layer: object, position: str, x: Tensor) -> Tensor:
    draw = partial(dropout.mask, layer, position, x.shape, x.device)
    y: Tensor = _Dropout.apply(x, draw, 1 / (1 - dropout.rate), dropout.keeps_masks)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], Tensor], scale: float, keeps_mask: bool) -> Tensor:
        mask = draw()
        # ``draw`` holds the key of this micro-batch: another one may be current when backward draws the mask again.
        ctx.save_for_backward(mask if keeps_mask else None)
        ctx.draw, ctx.scale = draw, scale
        return _masked(x, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return _masked(dy, ctx.draw() if mask is None else mask, ctx.scale), None, None, None


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute x · mask · scale."""
    # The backward of dropout is this product as one kernel on CUDA; the plain expression takes two and a temporary.
    return torch.ops.aten.native_dropout_backward(x, mask, scale)
