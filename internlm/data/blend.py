"""Blend of several datasets into one endless sequence of samples, with given shares of the tokens.

The sequence is that of worst-case fair weighted fair queueing (WF2Q; Bennett and Zhang 1996): of the datasets that have
had at most their share so far, the one whose next sample would complete its share first is next. The tokens of each
dataset then differ from its share by at most one sample, the longest, after any number of samples. Each dataset is
shuffled anew for each of its epochs.
"""

from __future__ import annotations

import bisect
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internlm.data.order import Block, Piece
from internlm.data.permutation import KeyedPermutation, Purpose
from internlm.utils.errors import DataError, Problem

BLOCK = 1 << 12  # items between two marks, from which a sequence is continued
CACHED_BLOCKS = 8
FIRST_ITEMS = 1 << 6
# Marks that are kept, of some 600 bytes each, and of these the last ones, which lie close together. Between others,
# items are passed over again: after 10^9 items, some 100 blocks at most.
MOST_MARKS, RECENT_MARKS = 1 << 12, 1 << 6
# A run whose epochs suffice by the estimate at its start must not end shortly before its last step: part of an epoch
# has a few more items than its tokens suggest.
TOLERANCE = 0.02
LARGEST = 1 << 62  # bound of numbers of items and tokens
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Dataset:
    """One dataset of a blend."""

    name: str
    items: np.ndarray  # [n] indices of its items: samples, or rows that samples have been packed into
    max_epochs: float | None = None  # passes over the items after which an error is raised


class Phase(NamedTuple):
    """Part of the sequence with fixed weights: it begins at a token, or at an item if items are counted."""

    begin: int
    weights: tuple[float, ...]  # positive or 0, one for each dataset


class Mark(NamedTuple):
    """State of the sequence before an item."""

    item: int  # items before
    token: int  # tokens before
    phase: int  # index of the phase
    phase_token: int  # tokens before the phase
    used: tuple[int, ...]  # items of each dataset before
    served: tuple[int, ...]  # tokens of each dataset in this phase
    chosen: int | None = None  # dataset of the item, if that is settled whatever the weights are


def _token(mark: Mark) -> int:
    return mark.token


def _item(mark: Mark) -> int:
    return mark.item


class Blend:
    """Endless sequence of items of several datasets.

    Args:
        datasets: The datasets.
        lengths: Tokens of each item, int64 [number of items of all datasets].
        longest: Number of tokens after which items are truncated; None: whole items.
        seed: Seed of the order in each dataset.
        by_items: Whether phases begin at items rather than at tokens.
    """

    def __init__(
        self, datasets: Sequence[Dataset], lengths: np.ndarray, longest: int | None, seed: int, by_items: bool
    ) -> None:
        self.datasets, self.by_items = datasets, by_items
        self._lengths, self._longest, self._seed = lengths, longest, seed
        self._lock = threading.RLock()
        none = (0,) * len(datasets)
        self.start(Mark(0, 0, 0, 0, none, none), [])

    def start(self, mark: Mark, phases: Sequence[Phase]) -> None:
        """Begin at ``mark``: what lies before it is forgotten, and ``phases`` replace the earlier ones."""
        with self._lock:
            self.phases = list(phases)
            self._marks, self._spacing = [mark], 1  # in ascending order; blocks from one of the older marks to the next
            self._blocks: dict[int, Block] = {}

    def between(self, start: int, stop: int) -> list[Piece]:
        """Return the pieces that tokens [``start``, ``stop``) of the sequence consist of."""
        with self._lock:
            number = self._number(self._last_mark(start, _token))
            pieces: list[Piece] = []
            while True:
                block = self._block(number)
                pieces += block.between(start, stop)
                if block.ends[-1] >= stop:
                    return pieces
                number += 1

    def samples(self, first: int, stop: int) -> list[Piece]:
        """Return the items at positions [``first``, ``stop``) of the sequence, as whole pieces."""
        with self._lock:
            pieces: list[Piece] = []
            while first < stop:
                number, at = divmod(first - self._marks[0].item, BLOCK)
                some = self._block(number).whole(at, at + stop - first)
                if not some:  # a dataset is used up in the block, of which the next call raises the error
                    self._block(number + 1)
                pieces += some
                first += len(some)
            return pieces

    def mark_at(self, position: int) -> Mark:
        """Return the mark of the item that holds token ``position``, or that is item ``position``.

        The dataset of an item that begins before ``position`` is given.
        """
        with self._lock:
            # Not beyond the position: the datasets may be used up there, at the end of a run.
            while self.place(self._marks[-1]) < position:
                if len(self._block(self._number(self._marks[-1])).samples) < BLOCK:
                    break
            walk = _Walk(self, self._last_mark(position, self.place))
            while walk.place < position and walk.end_of_next() <= position:
                walk.take()
            return walk.mark()._replace(chosen=walk.choose() if walk.place < position else None)

    def place(self, mark: Mark) -> int:
        """Return where a mark is: in items or in tokens."""
        return mark.item if self.by_items else mark.token

    def _number(self, mark: Mark) -> int:
        """Return the number of the block that begins at a mark."""
        return (mark.item - self._marks[0].item) // BLOCK

    def _last_mark(self, position: int, key: Callable[[Mark], int]) -> Mark:
        """Return the last known mark that is not after ``position``, in items or in tokens by ``key``."""
        found = bisect.bisect_right(self._marks, position, key=key)
        if not found:
            raise IndexError("rows before the one at which the run was resumed are not known")
        return self._marks[found - 1]

    def _block(self, number: int) -> Block:
        """Return the :data:`BLOCK` items of a block, or those until a dataset is used up."""
        if number not in self._blocks:
            first = self._marks[0].item + number * BLOCK
            walk = _Walk(self, self._last_mark(first, _item))
            while walk.item < first:
                walk.take()
            token = walk.token
            pairs: list[tuple[int, int]] = []
            try:
                while len(pairs) < BLOCK:
                    pairs.append(walk.take())
            except DataError:  # what is before the end of a dataset can still be used
                if not pairs:
                    raise
            items, lengths = np.array(pairs, np.int64).T
            # The first one is dropped, since training goes forward; it can be made again from a mark.
            if len(self._blocks) == CACHED_BLOCKS:
                del self._blocks[min(self._blocks)]
            self._blocks[number] = Block(items, lengths, np.cumsum(lengths) + token)
            if len(pairs) == BLOCK:
                self._add(walk.mark())
        return self._blocks[number]

    def _add(self, mark: Mark) -> None:
        """Keep a mark, and drop others if there are too many: the last ones, and one of every some, are left."""
        at = bisect.bisect_left(self._marks, mark.item, key=_item)
        if at < len(self._marks) and self._marks[at].item == mark.item:
            return
        self._marks.insert(at, mark)
        if len(self._marks) <= MOST_MARKS:
            return
        for spacing in (self._spacing, 2 * self._spacing):
            if len(self._marks) > MOST_MARKS // 2 + RECENT_MARKS:
                self._spacing = spacing
                old = [mark for mark in self._marks[:-RECENT_MARKS] if self._number(mark) % spacing == 0]
                self._marks = [*old, *self._marks[-RECENT_MARKS:]]

    def items_of(self, number: int, first: int) -> Iterator[tuple[int, int]]:
        """Yield items of a dataset with their lengths, from its ``first`` in all its epochs on.

        Raises:
            DataError: Its greatest number of epochs is over.
        """
        # In blocks that end with an epoch: the permutation of the next one is another.
        dataset = self.datasets[number]
        size = len(dataset.items)
        limit = None
        if dataset.max_epochs is not None:
            # The bound is that of a position; the product of large numbers may be infinite.
            limit = int(min(dataset.max_epochs * size * (1 + TOLERANCE), LARGEST)) + 1
        # Few at first: of many datasets, a block of the blend has few items of each.
        count = FIRST_ITEMS
        while True:
            epoch, at = divmod(first, size)
            # By name: the order must stay that of the dataset if the blend gets others.
            key = zlib.crc32(dataset.name.encode(errors="surrogateescape"))
            permutation = KeyedPermutation(size, self._seed, Purpose.ORDER, epoch, key)
            members = dataset.items[permutation(np.arange(at, min(at + count, size)))]
            count = min(2 * count, BLOCK)
            lengths = np.asarray(self._lengths[members])
            if self._longest is not None:
                lengths = np.minimum(lengths, self._longest)
            for pair in zip(members.tolist(), lengths.tolist(), strict=True):
                if limit is not None and first >= limit:
                    message = f"{dataset.max_epochs} for {dataset.name!r} are used up after {limit} of its samples"
                    todo = "Allow more, or give it a smaller weight in data.weights"
                    raise DataError(Problem("data.max_epochs", message, todo))
                yield pair
                first += 1


class _Walk:
    """Walk along a blend, item by item, from a mark on."""

    def __init__(self, blend: Blend, mark: Mark) -> None:
        self._phases, self._by_items = blend.phases, blend.by_items
        self.item, self.token, self._phase, self._phase_token = mark[:4]
        self._used, self._served = list(mark.used), list(mark.served)
        self._rests = [blend.items_of(number, count) for number, count in enumerate(mark.used)]
        self._heads: list[tuple[int, int] | None] = [None] * len(mark.used)
        self._next = mark.chosen

    def mark(self) -> Mark:
        """Return the state before the next item."""
        return Mark(self.item, self.token, self._phase, self._phase_token, tuple(self._used), tuple(self._served))

    @property
    def place(self) -> int:
        """Items before the next one, if items are counted, or tokens."""
        return self.item if self._by_items else self.token

    def end_of_next(self) -> int:
        """Return the place after the next item: its number plus one, or the tokens up to its end."""
        return self.item + 1 if self._by_items else self.token + self._head(self.choose())[1]

    def take(self) -> tuple[int, int]:
        """Take the next item; return it with its length."""
        chosen = self.choose()
        head = self._head(chosen)
        self._heads[chosen] = self._next = None
        self.item, self.token = self.item + 1, self.token + head[1]
        self._used[chosen] += 1
        self._served[chosen] += head[1]
        return head

    def _head(self, number: int) -> tuple[int, int]:
        if (head := self._heads[number]) is None:
            head = self._heads[number] = next(self._rests[number])
        return head

    def choose(self) -> int:
        """Return the number of the dataset whose item is next."""
        # Chosen when the end of the next item was asked for: the item has not been taken since.
        if self._next is not None:
            return self._next
        while self._phase + 1 < len(self._phases) and self.place >= self._phases[self._phase + 1].begin:
            self._phase, self._phase_token, self._served = self._phase + 1, self.token, [0] * len(self._used)
        # One pass over a few datasets: a heap of their finishes would be slower below some twenty.
        total, least = self.token - self._phase_token, math.inf
        for number, weight in enumerate(self._phases[self._phase].weights):
            # All cannot have had more than their shares; the factor is for the rounding of the shares.
            if weight and self._served[number] <= weight * total * ROUNDING:
                finish = (self._served[number] + self._head(number)[1]) / weight
                if finish < least:
                    self._next, least = number, finish
        assert self._next is not None
        return self._next
