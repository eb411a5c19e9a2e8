"""Training rows of a blend of dataset types, whose weights may change at steps."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from internlm.data.batch_plan import BatchPlan
from internlm.data.best_fit import BinOrder, Bins
from internlm.data.bins_cache import pack_source
from internlm.data.blend import LARGEST, TOLERANCE, Blend, Dataset, Mark, Phase
from internlm.data.order import SampleOrder
from internlm.data.packing import PackingLayout, Row, RowShape, make_row, trace_row
from internlm.data.provenance import TracedSpan
from internlm.data.rows import Items, RowsOfSource, check_index
from internlm.data.sources import SampleSource
from internlm.utils.errors import DataError, Problem, first_of_all_ranks
from internlm.utils.logger import get_logger

#: Names in the state of a checkpoint: of the place in the sequence, and, followed by its name, of a dataset type.
PLACE, TYPE = "blend", "blend/"
ROUNDING = 0.001


class TypeUse(NamedTuple):
    """Use of a dataset type before a row, as a checkpoint holds it."""

    items: int  # items before: samples, or rows that best-fit packing has made
    begun: int  # tokens used of the next item
    served: int  # tokens in this phase of the mixture, in whole items
    digest: int  # of the items and the seed: what the count refers to


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
        total_steps: Steps of the run, for estimates.

    Raises:
        DataError: ``mixture`` names a type that the source does not have.
    """

    def __init__(self, source: SampleSource, shape: RowShape, seed: int, mixture: Mixture, total_steps: int) -> None:
        self.source, self.shape, self.mixture, self._total_steps = source, shape, mixture, total_steps
        self.types, names = source.types, mixture.names
        if unknown := [name for name in (*names, *mixture.max_epochs) if name not in source.types]:
            message = f"{unknown[0]!r} is no dataset type of data.train_folder, only {', '.join(source.types)}"
            raise DataError(Problem("data.weights", message, "Name its first-level sub-folders"))
        members = [np.flatnonzero(source.type_ids == source.types.index(name)) for name in names]
        # Rows are packed before they are blended, and so a row counts as one item.
        self._bins: Bins | None = None
        self._lengths = source.lengths
        if shape.layout is PackingLayout.BEST_FIT:
            self._bins, counts = pack_source(source, shape, seed, dict(zip(names, members, strict=True)))
            self._lengths = self._bins.tokens
            members = np.split(np.arange(len(self._bins)), np.cumsum(counts)[:-1])
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
        self._seed = seed
        self._order: SampleOrder = self._blend if self._bins is None else BinOrder(self._bins, self._blend)
        #: Tokens, or items, of a row.
        self._unit = {PackingLayout.PADDED: shape.micro_bsz, PackingLayout.BEST_FIT: 1}.get(
            shape.layout, shape.packed_length
        )
        self._begin: Mark | None = None
        self._begins_anew = False
        #: Use of types that have no weight now, but may have one later.
        self._idle: dict[str, list[int]] = {}
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

    @functools.cached_property
    def _digests(self) -> list[int]:
        """Digest of the items and the seed for each dataset: with another one, a count of used items says nothing."""
        # Of the lengths: the order depends on no more than their number, and other samples have other lengths.
        lengths = (np.ascontiguousarray(self._lengths[dataset.items], "<i8") for dataset in self._blend.datasets)
        return [zlib.crc32(some.data, self._seed % (1 << 32)) for some in lengths]

    def state(self, row: int) -> dict[str, list[int]]:
        """Return how much of each type has been used before ``row``."""
        place = row * self._unit
        mark = self._blend.mark_at(place)
        state = {**self._idle, PLACE: [mark.item, mark.token, mark.phase, mark.phase_token]}
        for number, (name, digest) in enumerate(zip(self.mixture.names, self._digests, strict=True)):
            begun = place - mark.token if number == mark.chosen else 0
            state[TYPE + name] = [*TypeUse(mark.used[number], begun, mark.served[number], digest)]
        return state

    def resume(self, row: int, state: Mapping[str, list[int]], has_changed: bool = False) -> None:
        """Read on from ``row``.

        With another mixture, or other data, each type goes on from what has been used of it, and the shares begin
        anew. Without a state, unless something has changed, the sequence is followed from its beginning up to ``row``.

        Raises:
            DataError: The state is damaged, or, if nothing has changed, that of another blend.
        """
        uses, self._begins_anew = dict(_uses(state)), has_changed
        # Kept, since a later mixture may have a type again that this one lacks.
        self._idle = {
            TYPE + name: [use.items + (use.begun > 0), 0, 0, use.digest]
            for name, use in uses.items()
            if name not in self.mixture.names
        }
        if has_changed:
            self._begin = self._begin_anew(row, uses)
        else:
            self._begin = self._mark_of(row, state[PLACE], uses) if PLACE in state else None

    def _mark_of(self, row: int, numbers: list[int], uses: Mapping[str, TypeUse]) -> Mark:
        """Return the mark of ``row`` in a state of this blend, which is not trusted: it comes from a file."""
        # A state is that of the row, whatever the batch of a step was then.
        place, names = row * self._unit, self.mixture.names
        known = [uses[name] for name in names if name in uses]
        is_ours = len(numbers) == 4 and [use.digest for use in known] == self._digests
        if is_ours and 0 <= min(numbers) <= max(numbers) < LARGEST:
            begun = [number for number, use in enumerate(known) if use.begun]
            used, served = tuple(use.items for use in known), tuple(use.served for use in known)
            item, token, phase, phase_token = numbers
            mark = Mark(item, token, phase, phase_token, used, served, begun[0] if begun else None)
            if (
                mark.phase < len(self.mixture.changes)
                and len(begun) <= (0 if self._blend.by_items else 1)
                and place - self._blend.place(mark) == sum(use.begun for use in known)
                and sum(mark.served) == mark.token - mark.phase_token
            ):
                return mark
        message = f"the position of the blend does not fit {len(names)} dataset types and row {row}"
        raise DataError(Problem("state.json", message, "Resume from another checkpoint"))

    def _begin_anew(self, row: int, uses: Mapping[str, TypeUse]) -> Mark:
        """Return a mark at ``row`` from which the shares are counted, with what has been used of each type."""
        place, names = row * self._unit, self.mixture.names
        used, begun, chosen, texts = [], 0, None, []
        for number, (name, digest, dataset) in enumerate(zip(names, self._digests, self._blend.datasets, strict=True)):
            use = uses.get(name)
            if use is None or use.digest != digest:
                used.append(0)
                texts.append(f"{name} 0 ({'has no count' if use is None else 'other samples, or another order'})")
                continue
            # The sample that the row begins in is finished first, where rows are still cut from a stream of tokens.
            if use.begun and chosen is None and use.begun <= place and not self._blend.by_items:
                begun, chosen = use.begun, number
            used.append(use.items + (use.begun > 0 and chosen != number))
            texts.append(f"{name} {used[-1]} ({used[-1] / len(dataset.items):.4g} epochs)")
        if first_of_all_ranks(f"data.weights from row {row}"):
            unit = "samples" if self._bins is None else "rows"
            said = f"{unit} of each dataset type used before: {', '.join(texts)}"
            if not uses:
                said = "the checkpoint counts no dataset types, so each begins with its first epoch"
            get_logger().info(f"data.weights: the shares are counted from row {row} on; {said}")
        at = place - begun
        # Where it begins is all that the numbers of items and tokens tell.
        return Mark(at, at, 0, at, tuple(used), (0,) * len(used), chosen)

    def follow(self, plan: BatchPlan) -> None:
        """Take the plan that assigns rows to steps: the mixture changes at the first row of a step.

        Raises:
            DataError: The run, resumed with another mixture, needs more epochs of a type than are allowed.
        """
        # Changes before the plan's origin are over: without a state, the sequence has had the last of them from its
        # beginning. The item that holds the origin has been chosen before; they apply to those after it.
        origin, phases, begin_of_over = plan.origin, [], 0
        if self._begin is not None:
            begin_of_over = self._blend.place(self._begin) + (self._begin.chosen is not None)
        for step, shares in self.mixture.shares():
            is_over = step < origin.step or (step == origin.step and self._begin is None)
            begin = begin_of_over if is_over else plan.rows_of_step(step).first_row * self._unit
            phases.append(Phase(begin, tuple(shares[name] for name in self.mixture.names)))
        none = (0,) * len(self._blend.datasets)
        self._blend.start(self._begin or Mark(0, 0, 0, 0, none, none), phases)
        if self._begins_anew:
            self.check_epochs(plan)

    def epochs(self, plan: BatchPlan) -> dict[str, float]:
        """Return the number of epochs of each type that are used at the end of the run, by an estimate."""
        origin, total_steps = plan.origin, max(self._total_steps, plan.origin.step)
        # Before the origin, a run has used what its state says.
        used = dict.fromkeys(self.mixture.names, 0.0)
        if self._begin is not None:
            counts = zip(self.mixture.names, self._begin.used, strict=True)
            used = {name: count * self._means[name] for name, count in counts}
        steps = (max(step, origin.step) for step, _ in self.mixture.changes if step < total_steps)
        begins = [plan.rows_of_step(step).first_row for step in steps]
        ends = [*begins[1:], plan.position(total_steps).row]
        for begin, end, (_, shares) in zip(begins, ends, self.mixture.shares(), strict=False):
            tokens: float = (end - begin) * self._unit
            if self._blend.by_items:  # one of the mixture has this many tokens on average
                tokens /= sum(share / self._means[name] for name, share in shares.items())
            for name, share in shares.items():
                used[name] += share * tokens
        return {name: tokens / self.tokens[name] for name, tokens in used.items()}

    def check_epochs(self, plan: BatchPlan) -> None:
        """Raise if the run needs more epochs of a type than are allowed.

        Raises:
            DataError: It does.
        """
        tolerance = ROUNDING if self._begin is None else TOLERANCE  # of an epoch in progress, the tokens are estimated
        epochs = self.epochs(plan)
        for name, largest in self.mixture.max_epochs.items():
            if epochs.get(name, 0.0) > largest * (1 + tolerance):
                message = f"{largest:g} for {name!r}, but the {self._total_steps} steps need {epochs[name]:.4g}"
                todo = "Allow more, lower its weight, or train for fewer steps"
                raise DataError(Problem("data.max_epochs", message, todo))


def _uses(state: Mapping[str, list[int]]) -> Iterator[tuple[str, TypeUse]]:
    """Yield the types of a state with their use; other entries are left, which are those of other data."""
    for key, numbers in state.items():
        if key.startswith(TYPE):
            if len(numbers) != len(TypeUse._fields) or not 0 <= min(numbers) <= max(numbers) < LARGEST:
                raise DataError(
                    Problem(f"state.json: {key!r}", f"is damaged, got {numbers}", "Resume from another checkpoint")
                )
            yield key.removeprefix(TYPE), TypeUse(*numbers)
