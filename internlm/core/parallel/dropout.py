"""Dropout whose masks are the same in every layout.

A mask is a function of the run's seed, the step, the number of the micro-batch in the global batch, the layer and the
place in it. It is drawn for the whole row by a generator of its own, and each rank takes the tokens that it has. So
ranks, stages, blocks that are recomputed and runs that are resumed agree, and no state of a generator is kept.

Shapes: T tokens of the row, S of them here (T, or T over the ranks that share the row), H hidden.
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


@dataclass(frozen=True)
class DropoutKey:
    """What masks are drawn from, besides layer and place: who this rank is, and what it computes."""

    seed: int = 0
    data_rank: int = 0
    tensor_rank: int = 0  # among those that may share a row
    step: int = 0
    micro_num: int = 1  # micro-batches of a rank in this step
    number: int = 0  # of this one among them

    @property
    def micro_batch(self) -> int:
        """The number of the micro-batch in the global batch."""
        return self.data_rank * self.micro_num + self.number


_current: DropoutKey | None = None


@contextmanager
def dropout_key_scope(draws: DropoutKey) -> Iterator[None]:
    """Models that run within the block take their masks from ``draws``."""
    global _current
    outer, _current = _current, draws
    try:
        yield
    finally:
        _current = outer


def current_dropout_key() -> DropoutKey:
    """Those of the model that runs; raises :class:`UserError` where nobody said which micro-batch it has."""
    if _current is None:
        what = "a mask depends on step and micro-batch, and nobody says which the model has"
        raise UserError(Problem("model.drop_rate", what, "Call the model within drawing(Draws(...)), or after eval()"))
    return _current


@dataclass(frozen=True)
class Dropout:
    """Dropout (arXiv 1207.0580) of one micro-batch, whose row has ``tokens``; what is left is divided by 1 − rate.

    ``keeps_masks``: the mask waits for backward, a byte for each element; else it is drawn again.
    """

    rate: float
    keeps_masks: bool
    draws: DropoutKey
    tokens: int

    def __call__(self, layer: object, place: str, x: Tensor) -> Tensor:
        """x: [S, H] → [S, H], by the mask of ``place`` in ``layer``."""
        return _drop(self, layer, place, x)

    def mask(self, layer: object, place: str, shape: torch.Size, device: torch.device) -> Tensor:
        """What stays, of the tokens that are here: [S, H]."""
        draws, (own, width) = self.draws, shape
        seed = derived_seed(draws.seed, "dropout", draws.step, draws.micro_batch, layer, place)
        whole = torch.empty(self.tokens, width, dtype=torch.bool, device=device)
        whole.bernoulli_(1 - self.rate, generator=torch.Generator(device).manual_seed(seed))
        parts = self.tokens // own
        return whole if parts == 1 else whole.chunk(parts)[draws.tensor_rank].clone()


#: ``x`` at a place of a layer → what becomes of it.
Drop: TypeAlias = Callable[[str, Tensor], Tensor]


def no_drop(place: str, x: Tensor) -> Tensor:
    """``x``."""
    return x


@uncompiled("masks are drawn by generators of their own")
def _drop(dropout: Dropout, layer: object, place: str, x: Tensor) -> Tensor:
    draw = partial(dropout.mask, layer, place, x.shape, x.device)
    y: Tensor = _Dropout.apply(x, draw, 1 / (1 - dropout.rate), dropout.keeps_masks)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], Tensor], scale: float, keeps_mask: bool) -> Tensor:
        mask = draw()
        ctx.save_for_backward(mask if keeps_mask else None)
        ctx.draw, ctx.scale = draw, scale
        return _masked(x, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return _masked(dy, ctx.draw() if mask is None else mask, ctx.scale), None, None, None


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """x · mask · scale, one kernel on CUDA."""
    return torch.ops.aten.native_dropout_backward(x, mask, scale)
