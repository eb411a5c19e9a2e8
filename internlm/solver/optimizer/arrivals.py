"""When the gradients of a bucket are complete, found by counting.

How often a parameter is told of in a step, since its gradient has grown or autograd is done with it, depends on the
model and on the number of micro-batches alone. So the first step of a number of micro-batches teaches how often that
is, and in later ones a bucket is complete when it was as often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from internlm.solver.optimizer.flat_group import Member
from internlm.utils.errors import Problem, UserError


class Arrivals:
    """Calls ``complete(number)`` for each of ``buckets``, one after the other, once it and those before it are
    complete.

    A bucket with a parameter that gets no gradient, and those after it, are left to the end of the step.
    """

    def __init__(self, buckets: Sequence[Sequence[Member]], complete: Callable[[int], None]) -> None:
        self.buckets, self.complete = buckets, complete
        self._counts: dict[nn.Parameter, int] = {}
        self._holding: dict[nn.Parameter, list[int]] = {}
        for number, members in enumerate(buckets):
            for member in members:
                self._holding.setdefault(member.parameter, []).append(number)
                member.parameter.on_grad = partial(self._arrived, member)  # type: ignore[attr-defined]
        self._learned: dict[int, dict[nn.Parameter, int]] = {}
        self._expected: dict[nn.Parameter, int] = {}
        self._micro_batches: int | None = None
        self._missing: list[int] = []
        self._next = 0

    def begin_step(self, micro_batches: int | None) -> None:
        """Count anew; ``micro_batches`` will follow, or nobody knows how many."""
        self._counts = dict.fromkeys(self._holding, 0)
        self._micro_batches = micro_batches
        self._expected = self._learned.get(micro_batches, {}) if micro_batches else {}
        self._missing = [len(members) for members in self.buckets]
        self._next = 0

    def end_step(self) -> None:
        """All gradients are there: learn. What comes now comes too late."""
        if self._micro_batches:
            self._learned.setdefault(self._micro_batches, self._counts)
        self.begin_step(None)
        self._next = len(self.buckets)

    def _arrived(self, member: Member) -> None:
        parameter = member.parameter
        self._counts[parameter] = count = self._counts.get(parameter, 0) + 1
        expected = self._expected.get(parameter, 0)
        if count == expected:
            for number in self._holding[parameter]:
                self._missing[number] -= 1
            while self._next < len(self.buckets) and not self._missing[self._next]:
                self._next += 1
                self.complete(self._next - 1)
        elif count > expected and min(self._holding[parameter]) < self._next:
            what = f"a gradient of {member.name!r} came when its sum was begun, other than in the first step"
            todo = "Call optimizer.begin_reduction() after the last backward pass only, or set it to False"
            raise UserError(Problem("hybrid_zero_optimizer.overlap_sync_grad", what, todo))
