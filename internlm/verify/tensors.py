"""Tensors of several ranks: put together, and compared. Pure.

Which module is the first whose output differs. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from internlm.verify.record import Pass, RankRecord, ShardsByName, by_sample


@dataclass(frozen=True)
class Disagreement:
    """A tensor, or a part of one, that several ranks hold and that is not the same bit by bit."""

    name: str
    rank: int
    """The first that holds other values than a rank before it."""
    elements: int
    largest: float
    """Largest difference of an element."""

    def __str__(self) -> str:
        where = f"rank {self.rank} differs from a rank before it"
        return f"{self.name}: {where}, in {self.elements} elements by up to {self.largest:.2g}"


@dataclass
class Assembled:
    """Whole logical tensors, and what was wrong with their parts."""

    wholes: dict[str, Tensor] = field(default_factory=dict)
    shared: int = 0
    """Tensors of which several ranks hold the same elements."""
    disagreements: list[Disagreement] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    """Tensors of which some elements are held by no rank."""


def assemble(ranks: Sequence[ShardsByName]) -> Assembled:
    """Whole tensors from what each rank holds of them; where ranks disagree, the first one counts."""
    result = Assembled()
    for name in dict.fromkeys(name for held in ranks for name in held):
        _assemble(name, ranks, result)
    return result


def _assemble(name: str, ranks: Sequence[ShardsByName], result: Assembled) -> None:
    whole, known = torch.empty(0), torch.empty(0)
    shared, first_other = False, None
    for rank, held in enumerate(ranks):
        if name not in held:
            continue
        for at, box in held[name].slices.items():
            if not whole.numel():
                whole, known = torch.zeros(held[name].shape, dtype=box.dtype), torch.zeros(held[name].shape)
            where = tuple(slice(start, start + size) for start, size in zip(at, box.shape, strict=True))
            again = known[where].bool()
            other = again & ~_same(whole[where], box)
            shared = shared or bool(again.any())
            if first_other is None and other.any():
                largest = (whole[where] - box)[other].abs().max().item()
                first_other = Disagreement(name, rank, int(other.sum()), largest)
            whole[where] = torch.where(again, whole[where], box)
            known[where] = 1
    result.wholes[name] = whole
    result.shared += shared
    result.disagreements += [first_other] if first_other else []
    result.holes += [] if known.all() else [name]


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def put_together(parts: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    """Tensors of ``shape`` from what the ranks of a tensor group have of one: each part where all are whole; all parts
    side by side where they are parts along one axis; else nothing."""
    if all(part.shape == shape for part in parts):
        return list(parts)
    if any(part.dim() != len(shape) for part in parts):
        return []
    axes = {axis for part in parts for axis in range(len(shape)) if part.shape[axis] != shape[axis]}
    if len(axes) > 1 or sum(part.shape[axis] for axis in axes for part in parts) != sum(shape[axis] for axis in axes):
        return []
    return [torch.cat(list(parts), axis) for axis in axes]


def relative(value: float, reference: float) -> float:
    """|value − reference| / |reference|; 0 where both are the same, infinite where only the reference is zero."""
    return 0.0 if value == reference else abs(value - reference) / abs(reference) if reference else math.inf


def relative_l2(tensor: Tensor, reference: Tensor) -> float:
    """The same in the L2 norm; infinite where shapes differ."""
    if tensor.shape != reference.shape:
        return math.inf
    difference, norm = (tensor.double() - reference.double()).norm().item(), reference.double().norm().item()
    return 0.0 if difference == 0 else difference / norm if norm else math.inf


Tensors = Mapping[str, Tensor]


@dataclass
class Trace:
    """Modules in the order in which the reference went through them, and the relative difference of each; None where
    what the ranks have can't be put together."""

    limit: float
    differences: dict[str, float | None] = field(default_factory=dict)

    @property
    def compared(self) -> list[str]:
        """Those that could be compared."""
        return [name for name, difference in self.differences.items() if difference is not None]

    @property
    def first(self) -> str | None:
        """The first that differs by more than the limit, or is nan."""
        return next((name for name in self.compared if not self._of(name) <= self.limit), None)

    @property
    def last_equal(self) -> str | None:
        """The one just before it."""
        names = self.compared
        index = names.index(self.first) if self.first is not None else 0
        return names[index - 1] if index else None

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max(map(self._of, self.compared), default=0.0)

    def _of(self, name: str) -> float:
        difference = self.differences[name]
        assert difference is not None
        return difference


def trace(reference: RankRecord, ranks: Sequence[RankRecord], what: Callable[[Pass], Tensors], limit: float) -> Trace:
    """Compare ``what`` of the passes. Each data-parallel place of ``ranks`` has one, the first, of which each stage of
    the pipeline has its modules; ``reference`` has them all, in the order of the places."""
    wanted = [what(each) for each in reference.passes]
    places = [
        [[what(record.passes[0]) for record in group] for group in stages.values()]
        for stages in by_sample(ranks).values()
    ]
    assert len(wanted) == len(places), f"{len(wanted)} passes for {len(places)} places"
    names = dict.fromkeys(name for tensors in wanted for name in tensors)
    return Trace(limit, {name: _difference(name, wanted, places) for name in names})


def _difference(name: str, wanted: Sequence[Tensors], places: Sequence[Sequence[Sequence[Tensors]]]) -> float | None:
    """``places``: by data-parallel place and stage, what each rank of the tensor group has."""
    found: list[float] = []
    for tensors, stages in zip(wanted, places, strict=True):
        group = next((group for group in stages if all(name in part for part in group)), None)
        if group is None or name not in tensors:
            return None
        wholes = put_together([part[name] for part in group], tensors[name].shape)
        found += [relative_l2(whole, tensors[name]) for whole in wholes]
        if not wholes:
            return None
    return next((each for each in found if each != each), max(found))  # nan is the worst
