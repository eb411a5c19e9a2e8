"""Dropout whose masks do not depend on the parallel layout.

A mask is a function of the run's seed, the step, the index of the micro-batch in the global batch, the layer and the
position in the layer. An element of it depends on this key and its own index only, and is computed with integers
(:func:`keep_mask`). Hence masks agree across ranks, stages, recomputed blocks, resumed runs and kinds of devices, a
rank computes the part for its own tokens only, and no generator state is saved for backward. Megatron instead keeps one
random stream per tensor rank; torch's generators on a GPU depend on its number of processors.

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

from internlm.accelerator import kind_of
from internlm.core.context.random import derived_seed
from internlm.utils.errors import Problem, UserError
from internlm.utils.torch_private import uncompiled

#: Number of values of the 16 random bits that decide about an element.
VALUES = 2**16
#: Number of 64-bit integers computed at once on the CPU, so that they stay in a core's L2 cache.
CHUNK = 2**15
# Odd multipliers, as signed 64-bit integers: 2⁶⁴ / golden ratio, those of SplitMix64 (Steele, Lea and Flood 2014), and
# one for the products of both streams.
_GAMMA, _FIRST, _SECOND, _PRODUCT = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)


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
    """Probability that an element is dropped, rounded to a multiple of 2⁻¹⁶."""
    keeps_masks: bool
    """Whether masks are saved for backward, one byte per element, rather than computed again."""
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
        """Compute the mask of this rank's tokens, a bool tensor [S, H] that is True for elements to keep."""
        key, (own, width) = self.key, shape
        seed = derived_seed(key.seed, "dropout", key.step, key.micro_batch, layer, position)
        first = 0 if own == self.tokens else key.tensor_rank * own
        return keep_mask(seed, range(first, first + own), width, self.dropped_values, device)

    @property
    def dropped_values(self) -> int:
        """Number of the :data:`VALUES` for which an element is dropped."""
        return min(max(round(self.rate * VALUES), 1), VALUES - 1)

    @property
    def scale(self) -> float:
        """Factor on the elements that are kept."""
        return VALUES / (VALUES - self.dropped_values)


#: Dropout bound to a layer: (position in the layer, ``x``) → ``x`` after dropout.
Drop: TypeAlias = Callable[[str, Tensor], Tensor]


def no_drop(position: str, x: Tensor) -> Tensor:
    """Return ``x`` unchanged: dropout with rate 0."""
    return x


def keep_mask(seed: int, rows: range, width: int, dropped_values: int, device: torch.device) -> Tensor:
    """Compute rows of a mask, each element as a function of the seed, its row and its column: a bool tensor [S, H].

    Row i and columns 4·j to 4·j + 3 share the 64-bit integer x = u · v, where u and v are the outputs 2·i and 2·j + 1
    of SplitMix64 with state ``seed``, made odd. Its upper half, which depends on more bits of u and v, is added to its
    lower half, before and after a multiplication. Each 16 bits of the result decide about one element.

    Args:
        seed: Seed of the mask, 63 bits.
        rows: Indices of the rows.
        width: Number of columns, H.
        dropped_values: Number of the :data:`VALUES` for which an element is dropped.
        device: Device that computes the mask. The result is the same on all devices.
    """
    groups = -(-width // 4)
    u = _split_mix(seed, torch.arange(2 * rows.start, 2 * rows.stop, 2, device=device)) | 1  # [S]
    v = _split_mix(seed, torch.arange(1, 2 * groups, 2, device=device)) | 1  # [H/4]
    # An accelerator computes all rows at once, so that it has few kernels to launch.
    size = max(1, CHUNK // groups) if kind_of(device).is_host else len(rows)
    numbers = torch.empty(2, min(size, len(rows)), groups, dtype=torch.int64, device=device)
    mask = torch.empty(len(rows), 4 * groups, dtype=torch.bool, device=device)
    for start in range(0, len(rows), size):
        some = u[start : start + size, None]
        x, upper = numbers[:, : len(some)]
        torch.mul(some, v, out=x)
        x.add_(torch.bitwise_right_shift(x, 32, out=upper)).mul_(_PRODUCT)
        x.add_(torch.bitwise_right_shift(x, 32, out=upper))
        torch.ge(x.view(torch.int16), dropped_values - VALUES // 2, out=mask[start : start + size])
    return mask[:, :width].contiguous()


def _split_mix(seed: int, index: Tensor) -> Tensor:
    """Return the outputs of SplitMix64 (Steele, Lea and Flood 2014) with these indices, int64."""
    x = (index + 1) * _GAMMA + seed
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as unsigned integers are shifted."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@uncompiled("the key of a mask changes with every step and micro-batch")
def _drop(dropout: Dropout, layer: object, position: str, x: Tensor) -> Tensor:
    draw = partial(dropout.mask, layer, position, x.shape, x.device)
    y: Tensor = _Dropout.apply(x, draw, dropout.scale, dropout.keeps_masks)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], Tensor], scale: float, keeps_mask: bool) -> Tensor:
        mask = draw()
        # ``draw`` holds the key of this micro-batch: another one may be current when backward computes the mask again.
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
