"""Weights of linears in the blocked layout of oneDNN, for many products of a few tokens with the same weights.

A product of a few tokens takes the time of reading the weight. oneDNN reads its own layout up to twice as fast as rows,
which it copies into that layout first, block by block, in every call.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from internlm.ops.cpu.cpu_gemm import LEAST_WEIGHTS, TOKEN_MULTIPLE, onednn_serves, product_of_few, serves_columns
from internlm.ops.cpu.kernel_choice import kernel_for
from internlm.utils.torch_private import onednn_weight

#: Most bytes of weights that are packed, since the copies take as much memory again.
LARGEST = 1 << 30
#: Fewest products with each weight for which packing pays; it takes the time of about eight.
LEAST_USES = 16

_current: PackedWeights | None = None


class PackedWeights:
    """Packed copies of weights, which :func:`packed_linear` uses within :meth:`in_use`.

    The copies do not follow later changes of the weights.

    Args:
        weights: Weights of linears, [..., I]. Those that other kernels multiply faster are not copied.
        uses: Number of products with each weight; none is copied for a few.
    """

    def __init__(self, weights: Iterable[Tensor], uses: int) -> None:
        served = [weight for weight in weights if _is_packable(weight)] if uses >= LEAST_USES else []
        fits = sum(weight.nbytes for weight in served) <= LARGEST
        # The weights are kept, so that no other tensor gets the identity of one.
        self._copies = {id(w): (w, onednn_weight(w.detach().flatten(0, -2))) for w in served if fits}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the copies in the ``with`` block."""
        global _current
        outer, _current = _current, self
        try:
            yield
        finally:
            _current = outer

    def copy_of(self, weight: Tensor) -> Tensor | None:
        """Return the packed copy of ``weight``, or None if there is none."""
        found = self._copies.get(id(weight))
        return None if found is None else found[1]


def packed_linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """Compute the product of few tokens with a packed weight: [T, I] → [T, O]; None if other kernels are faster.

    Args:
        x: Input, [T, I].
        weight: Weight of the linear, [..., I].
    """
    if _current is None or x.shape[0] >= TOKEN_MULTIPLE or serves_columns(x):
        return None
    copy = _current.copy_of(weight)
    return None if copy is None else product_of_few(x, copy)


def _is_packable(weight: Tensor) -> bool:
    is_large = weight.numel() >= LEAST_WEIGHTS
    return is_large and onednn_serves(weight) and kernel_for("linear", "float32", weight.numel()) == "onednn"
