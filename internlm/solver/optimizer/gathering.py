"""The parameters after an update: every rank gets those that the others own.

Eagerly all of them are gathered at once, and waited for. Lazily (``overlap_sync_param``) a layer's are gathered just
before its forward pass, and those of the layer that comes next meanwhile. Which is next, the first forward pass
teaches. A parameter that no layer asked for in it is gathered eagerly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from internlm.core.context.group import Group
from internlm.core.parallel.attach import block_of
from internlm.core.parallel.collectives import Pending, begin_all_gather, begin_broadcast
from internlm.solver.optimizer.flat_group import FlatGroup


class Gatherer:
    """Gathers the buckets of ``flats`` over the ``zero`` group, lazily if asked to."""

    def __init__(self, model: nn.Module, flats: Sequence[FlatGroup], zero: Group, lazily: bool) -> None:
        self.zero = zero
        self.buckets = [(flat, number) for flat in flats for number in range(len(flat.buckets))]
        self._stale: set[int] = set()
        self._coming: dict[int, list[Pending]] = {}
        self._asked: list[frozenset[int]] = []  # by the layers, in the order of the first forward pass
        self._next: dict[frozenset[int], frozenset[int]] = {}
        self.lazily = lazily and zero.size > 1
        if self.lazily:
            self._listen(model)

    def _listen(self, model: nn.Module) -> None:
        """Be asked by each layer, and by whatever is used without being called."""
        holding: dict[nn.Parameter, set[int]] = {}
        for number, (flat, bucket) in enumerate(self.buckets):
            for member in flat.members_of(bucket):
                holding.setdefault(member.parameter, set()).add(number)
        for parameter, numbers in holding.items():
            parameter.before_use = partial(self.need, frozenset(numbers))  # type: ignore[attr-defined]
        for module, parameters in layers(model).items():
            needed = frozenset(number for each in parameters for number in holding.get(each, ()))
            module.register_forward_pre_hook(lambda _module, _args, needed=needed: self.need(needed))
        model.register_state_dict_pre_hook(lambda *_: self.finish())

    # -- a step -------------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """This rank's parts have changed."""
        if self.zero.size == 1:
            return
        self._stale = set(range(len(self.buckets)))
        asked = frozenset().union(*self._asked)
        self._begin(sorted(self._stale - asked))
        for number in sorted(self._coming):
            self._take(number)
        if self._asked:
            self._next = dict(zip(self._asked, self._asked[1:], strict=False))
            self._begin(sorted(self._asked[0]))

    def need(self, numbers: frozenset[int]) -> None:
        """Buckets that are to be used now."""
        if self._stale:
            for number in sorted(numbers & self._stale):
                self._take(number)
            self._begin(sorted(self._next.get(numbers, ())))
        elif not self._next and numbers not in self._asked:
            self._asked.append(numbers)

    def finish(self) -> None:
        """Have all of them."""
        for number in sorted(self._stale):
            self._take(number)

    def _begin(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._stale and number not in self._coming:
                self._coming[number] = begin_gather(*self.buckets[number], self.zero)

    def _take(self, number: int) -> None:
        self._begin([number])
        for pending in self._coming.pop(number):
            pending.wait()
        self._stale.discard(number)


def begin_gather(flat: FlatGroup, number: int, zero: Group) -> list[Pending]:
    """Begin to gather the values of one bucket."""
    bucket = flat.buckets[number]
    if bucket.is_even:
        return [begin_all_gather(flat.values[bucket.run(flat.rank)], zero, flat.values[bucket.first : bucket.last])]
    runs = [(rank, bucket.run(rank)) for rank in range(zero.size)]
    return [begin_broadcast(flat.values[run], zero, rank) for rank, run in runs if run.start < run.stop]


def layers(model: nn.Module) -> Mapping[nn.Module, Sequence[nn.Parameter]]:
    """The modules that a forward pass calls one after the other, with their parameters: each block as one, and every
    other module that has parameters of its own."""
    found: dict[nn.Module, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            found.setdefault(model.get_submodule(block_of(name)), []).extend(own)
    return found
