"""Projections of a block that a config computes as one fused linear or as several: wqkv, and gate and up.

Fused or not, a model has the same initial values and computes the same. What differs is what the optimizer and
checkpoints see: one tensor, or one for each range of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from internlm.config.schema import ModelConfig


class Part(NamedTuple):
    """Range of a tensor along an axis."""

    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class Projection:
    """Linear whose output consists of ranges along an axis, each of which may be a linear of its own."""

    name: Literal["wqkv", "w13"]
    """Name of the fused linear in its module."""
    axis: int
    """Axis of the output, and of weight and bias."""
    ranges: Mapping[str, slice]
    """Range of the axis by the name of the linear that it is without fusion, in the order of the ranges."""
    key: str
    """Config key by which it is fused."""

    def is_fused(self, model: ModelConfig) -> bool:
        """Return whether the config section ``model`` fuses the projection."""
        return bool(getattr(model, self.key))

    def parts(self, size: int) -> Iterator[tuple[str, Part]]:
        """Yield the name of each linear, and its part of a tensor that has ``size`` elements along the axis."""
        for name, extent in self.ranges.items():
            start, stop, _ = extent.indices(size)
            yield name, Part(self.axis, start, stop - start)


#: Of [kv heads, query heads per kv head + 2, head dimension], the query heads, the key head and the value head.
QKV = Projection("wqkv", 1, {"wq": slice(0, -2), "wk": slice(-2, -1), "wv": slice(-1, None)}, key="enable_qkv_fusion")
#: Of [2, intermediate size], gate and up.
GATE_UP = Projection("w13", 0, {"w1": slice(0, 1), "w3": slice(1, 2)}, key="mlp_layer_fusion")
