"""What a forward pass reads of layers without calling them.

A module hands out its parameters from a dict. While a forward pass is watched, the dict of a layer that is not being
called is one that tells when it is asked.

The parameters after an update: every rank gets those that the others own.

Eagerly all of them are gathered at once, and waited for. Lazily (``overlap_sync_param``) those of a layer are gathered
just before its forward pass, and those of the layer that comes next in the model meanwhile.

Buckets have an order, that of the model, and are always begun in it: whatever layers a rank happens to use, all ranks
begin the same gathers in the same order. A layer that was not called before the first update, or of which a forward
pass then read something without calling it, may be used in ways that can't be seen, so its parameters are gathered
eagerly.
"""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from internlm.core.context.group import Group
from internlm.core.parallel.blocks import containing_block, declared_blocks
from internlm.core.parallel.collectives import Pending, begin_all_gather, begin_broadcast
from internlm.core.parallel.param_state import set_wait_for_all_gather
from internlm.solver.optimizer.flat_buffers import FlatParamGroup
from internlm.utils.errors import Problem, UserError


class Reads:
    """Watches the forward passes of ``model`` until it is ended. ``layers``: what is called, each with the modules in
    it that have parameters of their own."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[nn.Module, Sequence[nn.Module]]]) -> None:
        self._owners = [owners for _, owners in layers]
        self._watched: dict[int, list[dict[str, Any]]] = {}  # by layer, the dicts that its modules have without us
        self._depth = 0  # of forward passes within one another
        self._beside: Counter[int] = Counter()
        self._last: tuple[int, Any] | None = None
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self._begin()),
            model.register_forward_hook(lambda *_: self._stop(), always_call=True),
        ]
        for number, (layer, _) in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(partial(self._on_call, number)))
            self._handles.append(layer.register_forward_hook(partial(self._on_return, number), always_call=True))

    def asked(self, layer: int, parameter: nn.Parameter) -> None:
        """Who has just read ``parameter`` of that layer saw to it that it is up to date."""
        if self._last is not None and self._last[0] == layer and self._last[1] is parameter:
            self._beside[layer] -= 1
            self._last = None

    def end(self) -> set[int]:
        """Watch no longer; the layers of which something was read, by somebody who did not ask, while they were not
        called."""
        self._leave_all()
        for handle in self._handles:
            handle.remove()
        return {layer for layer, count in self._beside.items() if count}

    def _begin(self) -> None:
        self._depth += 1
        if self._depth == 1:
            for number in range(len(self._owners)):
                self._watch(number)

    def _stop(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._leave_all()

    def _leave_all(self) -> None:
        for number in list(self._watched):
            self._leave(number)

    def _on_call(self, number: int, *_: Any) -> None:
        self._leave(number)

    def _on_return(self, number: int, *_: Any) -> None:
        if self._depth > 0:
            self._watch(number)

    def _watch(self, number: int) -> None:
        if number not in self._watched:
            owners = self._owners[number]
            self._watched[number] = [owner._parameters for owner in owners]
            for owner in owners:
                owner._parameters = _Telling(owner._parameters, partial(self._on_read, number))  # type: ignore[assignment]

    def _leave(self, number: int) -> None:
        for owner, parameters in zip(self._owners[number], self._watched.pop(number, ()), strict=False):
            owner._parameters = parameters

    def _on_read(self, number: int, what: Any) -> None:
        self._beside[number] += 1
        self._last = number, what


class _Telling(UserDict[str, Any]):
    """``content`` itself, but that whatever is taken from it is told."""

    def __init__(self, content: dict[str, Any], tell: Callable[[Any], None]) -> None:
        self.data, self._tell = content, tell

    def __getitem__(self, key: str) -> Any:
        self._tell(self.data[key])
        return self.data[key]


class Gatherer:
    """Gathers the buckets of ``flats`` over the ``zero`` group, lazily if asked to.

    ``begun`` and ``ready`` count buckets, in their order: all before them are on their way, or there.
    """

    def __init__(self, model: nn.Module, flats: Sequence[FlatParamGroup], zero: Group, lazily: bool) -> None:
        self.zero = zero
        self.buckets = in_forward_order(flats)
        self.begun = self.ready = len(self.buckets)
        self.lazily = lazily and zero.size > 1 and bool(flats)
        self._coming: list[list[Pending]] = []
        self._needed: list[int] = []  # buckets that each layer needs to be ready
        self._called: set[int] = set()  # layers, before the first update
        self._reads: Reads | None = None  # until then
        if self.lazily:
            self._listen(model)

    def _listen(self, model: nn.Module) -> None:
        """Be asked by each layer, and by whatever is used without being called."""
        needed: dict[nn.Parameter, int] = {}
        for number, (flat, bucket) in enumerate(self.buckets):
            needed |= {member.parameter: number + 1 for member in flat.members_of(bucket)}
        called = list(layers(model).items())
        self._reads = Reads(model, called)
        for layer, (module, owners) in enumerate(called):
            parameters = [each for owner in owners for each in owner.parameters(recurse=False)]
            self._needed.append(max((needed.get(each, 0) for each in parameters), default=0))
            module.register_forward_pre_hook(partial(self._on_call, layer))
            for parameter in parameters:
                set_wait_for_all_gather(parameter, partial(self._on_use, layer, parameter))
        model.register_forward_hook(lambda *_: self.finish())  # before gradients are sent over the same group
        model.register_state_dict_pre_hook(lambda *_: self.demand_all("model.state_dict()"))

    def _on_call(self, layer: int, _module: nn.Module, _args: Any) -> None:
        self.need(layer)

    def _on_use(self, layer: int, parameter: nn.Parameter) -> None:
        if self._reads:
            self._reads.asked(layer, parameter)
        self.need(layer)

    def demand_all(self, where: str) -> None:
        """Refuse what would wait for other ranks in vain, or be overwritten, since something is still to come."""
        if self.ready < len(self.buckets):
            todo = "Call optimizer.gather_parameters() on all ranks first"
            raise UserError(Problem(where, "not all is gathered yet (overlap_sync_param)", todo))

    # -- a step -------------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """This rank's parts have changed."""
        if self._reads:
            self._called -= self._reads.end()
            self._reads = None
            self._agree()
        if not self.lazily:
            self.gather_all()
            return
        self.begun = self.ready = 0
        unseen = (needed for layer, needed in enumerate(self._needed) if layer not in self._called)
        self._take(max(unseen, default=0))
        self._begin(self._needed[0])

    def gather_all(self) -> None:
        """This rank's parts were set: have all the others'."""
        if self.zero.size > 1:
            self.begun = self.ready = 0
            self.finish()

    def _agree(self) -> None:
        """Leave to be gathered late what all ranks have called: what one of them waits for in the update, all must
        begin there."""
        called = torch.tensor([layer in self._called for layer in range(len(self._needed))], dtype=torch.int32)
        called = called.to(self.buckets[0][0].values.device)
        dist.all_reduce(called, dist.ReduceOp.MIN, group=self.zero.handle)  # once, so the ledger need not know of it
        self._called = {layer for layer, by_all in enumerate(called.tolist()) if by_all}

    def need(self, layer: int) -> None:
        """A layer is to be used now."""
        if self._reads:
            self._called.add(layer)
        if self.ready < len(self.buckets):
            self._take(self._needed[layer])
            self._begin(max(self._needed[: layer + 2]))

    def finish(self) -> None:
        """Have all of them."""
        self._begin(len(self.buckets))
        self._take(len(self.buckets))

    def _begin(self, count: int) -> None:
        for flat, number in self.buckets[self.begun : count]:
            self._coming.append(begin_gather(flat, number, self.zero))
        self.begun = max(self.begun, count)

    def _take(self, count: int) -> None:
        self._begin(count)
        while self.ready < count:
            for pending in self._coming.pop(0):
                pending.wait()
            self.ready += 1


def begin_gather(flat: FlatParamGroup, number: int, zero: Group) -> list[Pending]:
    """Begin to gather the values of one bucket."""
    bucket = flat.buckets[number]
    if bucket.is_even:
        return [begin_all_gather(flat.values[bucket.run(flat.rank)], zero, flat.values[bucket.first : bucket.last])]
    runs = [(rank, bucket.run(rank)) for rank in range(zero.size)]
    return [begin_broadcast(flat.values[run], zero, rank) for rank, run in runs if run.start < run.stop]


def in_forward_order(flats: Sequence[FlatParamGroup]) -> list[tuple[FlatParamGroup, int]]:
    """All buckets of all groups, by the first in the model of the parameters that lie in each."""
    buckets = [(flat, number) for flat in flats for number in range(len(flat.buckets))]
    return sorted(buckets, key=lambda each: min((m.place for m in each[0].members_of(each[1])), default=0))


def layers(model: nn.Module) -> Mapping[nn.Module, Sequence[nn.Module]]:
    """The modules that a forward pass calls one after the other: each block as one, and every other module that has
    parameters of its own; with those in them that have some."""
    found: dict[nn.Module, list[nn.Module]] = {}
    blocks = declared_blocks(model)
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            found.setdefault(model.get_submodule(containing_block(name, blocks)), []).append(module)
    return found
