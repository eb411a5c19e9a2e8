"""Functions that assemble and compare the tensors of several ranks.

:func:`assemble` builds logical tensors from the shards of all ranks; :func:`trace_modules` compares the outputs of
modules and finds the first module that differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from internlm.verify.record import Pass, RankRecord, ShardsByName, by_sample, index_of


@dataclass(frozen=True)
class Disagreement:
    """Value that several ranks store and that is not bitwise equal on all of them."""

    name: str
    rank: int
    """First rank whose values differ from those of a lower rank."""
    elements: int
    largest: float
    """Largest absolute difference of an element."""

    def __str__(self) -> str:
        where = f"rank {self.rank} differs from a lower rank"
        return f"{self.name}: {where}, in {self.elements} elements by up to {self.largest:.2g}"


@dataclass
class Assembled:
    """Logical tensors built from shards, with the errors found in the shards."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: int = 0
    """Number of tensors with elements that several ranks store."""
    disagreements: list[Disagreement] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    """Names of tensors with elements that no rank stores."""


def assemble(ranks: Sequence[ShardsByName]) -> Assembled:
    """Build logical tensors from the shards of each rank; where ranks disagree, the lowest rank's values are used."""
    result = Assembled()
    for name in dict.fromkeys(name for shards in ranks for name in shards):
        _assemble(name, ranks, result)
    return result


def _assemble(name: str, ranks: Sequence[ShardsByName], result: Assembled) -> None:
    whole, known = torch.empty(0), torch.empty(0)
    shared, disagreement = False, None
    for rank, shards in enumerate(ranks):
        if name not in shards:
            continue
        for offsets, values in shards[name].slices.items():
            if not whole.numel():
                whole, known = torch.zeros(shards[name].shape, dtype=values.dtype), torch.zeros(shards[name].shape)
            index = index_of(offsets, values)
            again = known[index].bool()
            other = again & ~_same(whole[index], values)
            shared = shared or bool(again.any())
            if disagreement is None and other.any():
                largest = (whole[index] - values)[other].abs().max().item()
                disagreement = Disagreement(name, rank, int(other.sum()), largest)
            # Keep the first rank's values, so that every later rank is compared with them.
            whole[index] = torch.where(again, whole[index], values)
            known[index] = 1
    result.tensors[name] = whole
    result.shared += shared
    result.disagreements += [disagreement] if disagreement else []
    result.holes += [] if known.all() else [name]


def _same(a: Tensor, b: Tensor) -> Tensor:
    # A NaN that all ranks have is a failure of the run, which the loss shows, not a disagreement.
    return (a == b) | (a.isnan() & b.isnan())


def join_shards(shards: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    """Join the shards of one module's output, one per rank of a tensor group, into tensors of ``shape``.

    Returns:
        All shards if each has the full shape; one tensor if they are split along one axis; else an empty list.
    """
    if all(shard.shape == shape for shard in shards):
        return list(shards)
    if any(shard.dim() != len(shape) for shard in shards):
        return []
    # Shards need not be equally large: five heads on two ranks are three and two.
    axes = {axis for shard in shards for axis in range(len(shape)) if shard.shape[axis] != shape[axis]}
    if len(axes) > 1 or sum(s.shape[axis] for axis in axes for s in shards) != sum(shape[axis] for axis in axes):
        return []
    return [torch.cat(list(shards), axis) for axis in axes]


def relative(value: float, reference: float) -> float:
    """Return |value − reference| / |reference|: 0 if both are equal, inf if only the reference is zero."""
    return 0.0 if value == reference else abs(value - reference) / abs(reference) if reference else math.inf


def relative_l2(tensor: Tensor, reference: Tensor) -> float:
    """Return ‖tensor − reference‖ / ‖reference‖ in the L2 norm; inf if the shapes differ."""
    if tensor.shape != reference.shape:
        return math.inf
    # In fp64, since norms of half-precision tensors overflow, and the comparison must not add rounding of its own.
    difference, norm = (tensor.double() - reference.double()).norm().item(), reference.double().norm().item()
    return 0.0 if difference == 0 else difference / norm if norm else math.inf


Tensors = Mapping[str, Tensor]


@dataclass
class ModuleTrace:
    """Relative difference of each module's tensors between several ranks and the reference run.

    Modules are listed in the order in which they returned in the reference run. The difference of a module whose
    tensors cannot be compared is None.
    """

    limit: float
    differences: dict[str, float | None] = field(default_factory=dict)

    @property
    def compared(self) -> list[str]:
        """Names of the modules that could be compared."""
        return [name for name, difference in self.differences.items() if difference is not None]

    @property
    def first(self) -> str | None:
        """First module whose difference exceeds the limit or is NaN."""
        return next((name for name in self.compared if not self._of(name) <= self.limit), None)

    @property
    def last_equal(self) -> str | None:
        """Last module compared before :attr:`first`, if any."""
        names = self.compared
        index = names.index(self.first) if self.first is not None else 0
        return names[index - 1] if index else None

    @property
    def worst(self) -> float:
        """Largest difference of any module that could be compared."""
        return max(map(self._of, self.compared), default=0.0)

    def _of(self, name: str) -> float:
        difference = self.differences[name]
        assert difference is not None
        return difference


def trace_modules(
    reference: RankRecord, ranks: Sequence[RankRecord], tensors_of: Callable[[Pass], Tensors], limit: float
) -> ModuleTrace:
    """Compare the module outputs of several ranks, or the outputs' gradients, with those of the reference run.

    Args:
        reference: Record of one process, with one or more passes for each data-parallel rank, in their order.
        ranks: Record of each rank, whose first pass contains the modules of the rank's pipeline stage.
        tensors_of: Function that returns the outputs or the gradients of a pass.
        limit: Relative difference above which a module is reported as different.
    """
    by_data_rank = [
        [[tensors_of(record.passes[0]) for record in group] for group in stages.values()]
        for stages in by_sample(ranks).values()
    ]
    # A detailed record has all micro-batches of each data-parallel rank; compare the first.
    micro_batches, rest = divmod(len(reference.passes), len(by_data_rank))
    assert rest == 0 < micro_batches, f"expected {len(by_data_rank)} passes, got {len(reference.passes)}"
    wanted = [tensors_of(watched) for watched in reference.passes[::micro_batches]]
    names = dict.fromkeys(name for tensors in wanted for name in tensors)
    return ModuleTrace(limit, {name: _difference(name, wanted, by_data_rank) for name in names})


def _difference(name: str, wanted: Sequence[Tensors], found: Sequence[Sequence[Sequence[Tensors]]]) -> float | None:
    """Return the largest relative difference of a module's tensors; None if they cannot be compared.

    Args:
        name: Name of the module.
        wanted: Tensors of the reference, by data-parallel rank.
        found: Tensors of the ranks, by data-parallel rank, stage and tensor rank.
    """
    differences: list[float] = []
    for tensors, stages in zip(wanted, found, strict=True):
        group = next((group for group in stages if all(name in shards for shards in group)), None)
        if group is None or name not in tensors:
            return None
        wholes = join_shards([shards[name] for shards in group], tensors[name].shape)
        differences += [relative_l2(whole, tensors[name]) for whole in wholes]
        if not wholes:
            return None
    # max() would lose a NaN, which is the worst difference.
    return next((difference for difference in differences if math.isnan(difference)), max(differences))
