"""Training rows of a blend of dataset types, whose weights may change at steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from internlm.data.batch_plan import BatchPlan
from internlm.data.best_fit import BinOrder, Bins, joined, pack
from internlm.data.blend import Blend, Dataset, Mark, Phase
from internlm.data.order import SampleOrder
from internlm.data.packing import PackingLayout, Row, RowShape, make_row, trace_row
from internlm.data.provenance import TracedSpan
from internlm.data.rows import Items, RowsOfSource, check_index
from internlm.data.sources import SampleSource
from internlm.utils.errors import DataError, Problem

STATE = "blend"


@dataclass(frozen=True)
class Mixture:
    """Shares of the dataset types in the tokens, from each of some steps on."""

    changes: tuple[tuple[int, Mapping[str, float]], ...]  # (step, positive weights by dataset type), ascending
    max_epochs: Mapping[str, float] = field(default_factory=dict)  # by dataset type

    @property
    def names(self) -> list[str]:
        """Dataset types with a weight, in alphabetical order."""
        return sorted({name for _, weights in self.changes for name, weight in weights.items() if weight > 0})

    def shares(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield each step with the shares from it on, which add up to 1."""
        for step, weights in self.changes:
            total = sum(weights.values())
            yield step, {name: weights.get(name, 0.0) / total for name in self.names}


class BlendRows(RowsOfSource):
    """Endless sequence of training rows with given shares of the dataset types.

    Args:
        source: Source of the samples of all types.
        shape: Sizes and packing layout of a row. Samples are packed without regard to their types, but in the best-fit
            layout a row has one type.
        seed: Seed of the order of the samples of each type.
        mixture: Shares of the types.

    Raises:
        DataError: ``mixture`` names a type that the source does not have.
    """

    def __init__(self, source: SampleSource, shape: RowShape, seed: int, mixture: Mixture) -> None:
        self.source, self.shape, self.mixture = source, shape, mixture
        self.types, names = source.types, mixture.names
        if unknown := [name for name in (*names, *mixture.max_epochs) if name not in source.types]:
            message = f"{unknown[0]!r} is no dataset type of data.train_folder, only {', '.join(source.types)}"
            raise DataError(Problem("data.weights", message, "Name its first-level sub-folders"))
        members = [np.flatnonzero(source.type_ids == source.types.index(name)) for name in names]
        # Rows are packed before they are blended, and so a row counts as one item.
        self._bins: Bins | None = None
        self._lengths = source.lengths
        if shape.layout is PackingLayout.BEST_FIT:
            bins = [pack(source.lengths, shape.seq_len, shape.packed_length, seed, some) for some in members]
            self._bins = joined(bins)
            self._lengths = self._bins.tokens
            members = np.split(np.arange(len(self._bins)), np.cumsum([len(some) for some in bins])[:-1])
        #: Tokens of each type.
        self.tokens = {name: self._tokens_of(some) for name, some in zip(names, members, strict=True)}
        if empty := [name for name, tokens in self.tokens.items() if not tokens]:
            message = f"{empty[0]!r} has a weight, but its samples have no tokens"
            raise DataError(Problem("data.weights", message, "Remove it from the weights"))
        used = source.lengths[np.isin(source.type_ids, [source.types.index(name) for name in names])]
        #: Rows, padding and cuts of one epoch of all types, for a log.
        self.description = Items(used if self._bins is None else self._lengths, self._bins).describe_rows(used, shape)
        datasets = [
            Dataset(name, some, mixture.max_epochs.get(name)) for name, some in zip(names, members, strict=True)
        ]
        #: Mean tokens of an item of each type.
        self._means = {name: self.tokens[name] / len(some) for name, some in zip(names, members, strict=True)}
        by_items = shape.layout in (PackingLayout.PADDED, PackingLayout.BEST_FIT)
        self._blend = Blend(datasets, self._lengths, shape.longest_sample, seed, by_items)
        self._order: SampleOrder = self._blend if self._bins is None else BinOrder(self._bins, self._blend)
        #: Tokens, or items, of a row.
        self._unit = {PackingLayout.PADDED: shape.micro_bsz, PackingLayout.BEST_FIT: 1}.get(
            shape.layout, shape.packed_length
        )
        self._begin: Mark | None = None
        self.follow(BatchPlan(step_rows=1, data_size=1))

    def _tokens_of(self, items: np.ndarray) -> int:
        longest = self.shape.longest_sample
        lengths = self._lengths[items]
        return int((lengths if longest is None else np.minimum(lengths, longest)).sum())

    def __len__(self) -> int:
        """Return the number of rows that the tokens of all types fill."""
        return -(-sum(self.tokens.values()) // self.shape.packed_length)

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``."""
        check_index(index)
        return make_row(self.source, self._order, self.shape, index)

    def trace(self, index: int) -> list[TracedSpan]:
        """Return the pieces of row ``index`` with the files that they are from."""
        return trace_row(self.source, self._order, self.shape, index)

    def state(self, row: int) -> dict[str, list[int]]:
        """Return how much of each type has been used before ``row``."""
        return {STATE: self._blend.mark_at(row * self._unit).numbers()}

    def resume(self, row: int, state: Mapping[str, list[int]]) -> None:
        """Read on from ``row``; without a state the sequence is followed from its beginning up to there.

        Raises:
            DataError: The state is that of another blend.
        """
        # A state is that of the row, whatever the batch of a step was then, and is not trusted: it comes from a file.
        numbers = state.get(STATE)
        self._begin = None
        if numbers is None:
            return
        place = row * self._unit
        mark = Mark.of_numbers(numbers) if len(numbers) == 4 + 2 * len(self._blend.datasets) else None
        if mark is None or not self._fits(mark, place):
            message = f"the position of the blend does not fit {len(self._blend.datasets)} dataset types and row {row}"
            raise DataError(Problem("state.json", message, "Resume from another checkpoint"))
        self._begin = mark

    def _fits(self, mark: Mark, place: int) -> bool:
        """Return whether a mark may be that of ``place``: its counts add up, and its item is the one at the place."""
        size = 1 if self._blend.by_items else max(1, int(self._lengths.max()))
        return (
            min(mark.numbers()) >= 0
            and mark.phase < len(self.mixture.changes)
            and 0 <= place - self._blend.place(mark) < size
            and sum(mark.used) == mark.item
            and sum(mark.served) == mark.token - mark.phase_token
        )

    def follow(self, plan: BatchPlan) -> None:
        """Take the plan that assigns rows to steps: the mixture changes at the first row of a step."""
        # Changes before the plan's origin are over: without a state, the sequence has had the last of them from its
        # beginning. A state has the phase in which its item was chosen. The item may be unfinished at the origin, and
        # phases that have begun since apply after it.
        origin, phases = plan.origin, []
        after_item = 0 if self._begin is None else self._blend.place(self._begin) + 1
        for step, shares in self.mixture.shares():
            is_over = step < origin.step or (step == origin.step and self._begin is None)
            begin = after_item if is_over else plan.rows_of_step(step).first_row * self._unit
            phases.append(Phase(begin, tuple(shares[name] for name in self.mixture.names)))
        none = (0,) * len(self._blend.datasets)
        self._blend.start(self._begin or Mark(0, 0, 0, 0, none, none), phases)

    def epochs(self, plan: BatchPlan, total_steps: int) -> dict[str, float]:
        """Return the number of epochs of each type that a run of ``total_steps`` needs."""
        begins = [plan.rows_of_step(step).first_row for step, _ in self.mixture.changes if step < total_steps]
        used = dict.fromkeys(self.mixture.names, 0.0)
        ends = [*begins[1:], plan.position(total_steps).row]
        for begin, end, (_, shares) in zip(begins, ends, self.mixture.shares(), strict=False):
            tokens: float = (end - begin) * self._unit
            if self._blend.by_items:  # one of the mixture has this many tokens on average
                tokens /= sum(share / self._means[name] for name, share in shares.items())
            for name, share in shares.items():
                used[name] += share * tokens
        return {name: tokens / self.tokens[name] for name, tokens in used.items()}
