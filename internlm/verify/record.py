"""What one rank records of a run: plain data that can travel between processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import TypeAlias

from torch import Tensor

from internlm.core.parallel.ledger import Traffic
from internlm.core.parallel.placement import TensorSlice

Offsets: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class TensorShards:
    """The boxes of one logical tensor that a rank holds, by their offsets."""

    shape: tuple[int, ...]
    slices: dict[Offsets, Tensor]


#: By logical name.
ShardsByName: TypeAlias = dict[str, TensorShards]


@dataclass
class Pass:
    """Modules in one micro-batch, in the order in which they ended: their outputs, and the gradients of those."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a rank is: among those that read different samples, among those that share a layer, in the pipeline, and
    among those that share the optimizer's state."""

    data: int
    tensor: int
    stage: int
    zero: int = 0


@dataclass(frozen=True)
class RankRecord:
    """All that a rank knows about its run."""

    place: Place
    losses: list[float]
    norms: list[float]
    """Global gradient norms, before clipping."""
    gradients: ShardsByName
    """Of the first step: reduced over the ranks, not clipped."""
    parameters: ShardsByName
    """After the last step."""
    passes: list[Pass]
    """Of the micro-batches of the first step that were asked for."""
    traffic: list[Traffic]
    """Step by step."""
    tokens: list[list[int]]
    """Labels that count, of each micro-batch of each step."""
    types: int
    """Of data sets."""


def hold(
    held: ShardsByName, name: str, shape: tuple[int, ...], boxes: Iterable[TensorSlice], flat: Tensor, begin: int = 0
) -> None:
    """Add copies of ``boxes`` of the logical tensor ``name`` to ``held``; they are runs of ``flat``, counted from
    ``begin``."""
    mine = held.setdefault(name, TensorShards(shape, {}))
    for box in boxes:
        mine.slices[box.offsets] = flat[begin + box.start : begin + box.stop].view(box.sizes).detach().clone()


def by_sample(records: Iterable[RankRecord]) -> Mapping[int, Mapping[int, list[RankRecord]]]:
    """Records by data-parallel place and pipeline stage; those of one stage in the order of the tensor group."""
    places: dict[int, dict[int, list[RankRecord]]] = {}
    for record in sorted(records, key=lambda record: astuple(record.place)):
        places.setdefault(record.place.data, {}).setdefault(record.place.stage, []).append(record)
    return places
