"""Which module is the first whose output differs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from internlm.verify.record import Pass, RankRecord, by_sample
from internlm.verify.tensors import put_together, relative_l2

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
