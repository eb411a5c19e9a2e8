"""isp's weights: gathered for a product and given up after it, the next ones fetched meanwhile.

The linears have numbers, in the order in which they run; those of one block are neighbours. A forward pass takes those
of a chunk upwards (a model that is not split into pipeline stages is one chunk), a backward pass downwards; where a
block is recomputed, upwards within the block and then downwards. Whatever is fetched ahead is used in the same pass, or
given up when the next one begins, so no weight changes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import Pending, begin_all_gather, begin_reduce_scatter
from internlm.core.parallel.param_state import main_grad_of, wait_for_all_gather
from internlm.utils.torch_private import at_end_of_backward, in_backward

#: Where in a block the gathers of the next one may be launched: before a linear, by its place; -1 is the kernel of
#: attention.
LAUNCH_PLACES = {"wqkv": 0, "attn": -1, "wo": 1, "w1": 2}


@dataclass(frozen=True)
class Overlap:
    """How weights are fetched ahead, see ``parallel.weight`` in the config."""

    enabled: bool = False
    per_layer: bool = True
    launch_place: int = LAUNCH_PLACES["wo"]
    memory_pool: bool = False


@dataclass(frozen=True)
class Linear:
    """One linear in the order."""

    weight: nn.Parameter  # this rank's rows
    rows: int  # of the whole matrix, without padding
    block: int
    place: int  # within the block
    chunk: int = 0


class WeightGatherer:
    """The isp communicator of a model: gathers weights and reduces their gradients over the weight group."""

    def __init__(self, group: Group, linears: Sequence[Linear], overlap: Overlap) -> None:
        self.group, self.linears, self.overlap = group, linears, overlap
        self._members: dict[int, list[int]] = {}  # numbers of each block
        for number, linear in enumerate(linears):
            self._members.setdefault(linear.block, []).append(number)
        self.pool: dict[torch.Size, list[Tensor]] = {}  # free buffers
        self._held: dict[int, Tensor] = {}  # buffers in use, by number
        self._coming: dict[int, Pending] = {}
        self._delivery: Callable[[], object] | None = None
        self._recomputed: set[int] = set()  # blocks that were seen to be

    # -- weights ------------------------------------------------------------------------------------------------------
    def take(self, number: int, backward: bool) -> Tensor:
        """The whole weight, [O, I]; it must be released before it is taken again."""
        if not backward and not in_backward() and not self._same_chunk(number, number - 1):
            self._begin_forward()
        self._fetch([number])
        whole = self._coming.pop(number).wait()
        if self.overlap.enabled:
            self._fetch(self._next(number, backward))
        return whole[: self.linears[number].rows]

    def release(self, number: int) -> None:
        """The product is done."""
        buffer = self._held.pop(number)
        if self.overlap.memory_pool:
            self.pool.setdefault(buffer.shape, []).append(buffer)

    def before_attention(self, block: int) -> None:
        """The kernel of a block's attention is about to run."""
        if self.overlap.enabled and self.overlap.per_layer and not in_backward():
            self._fetch(self._next_block(block, LAUNCH_PLACES["attn"]))

    def _fetch(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number not in self._coming:
                assert number not in self._held, f"weight {number} is in use already"
                shard = wait_for_all_gather(self.linears[number].weight).detach()
                self._held[number] = self._buffer(shard)
                self._coming[number] = begin_all_gather(shard, self.group, self._held[number])

    def _buffer(self, shard: Tensor) -> Tensor:
        shape = torch.Size((shard.shape[0] * self.group.size, shard.shape[1]))
        free = self.pool.get(shape)
        return free.pop() if free else shard.new_empty(shape)

    def _next(self, number: int, backward: bool) -> Sequence[int]:
        """What to fetch while ``number`` is used."""
        here = self.linears[number]
        if backward:
            return self._previous(number)
        if in_backward():  # the block is recomputed
            self._recomputed.add(here.block)
            return [n for n in [number + 1] if n in self._block(here.block)]
        if self.overlap.per_layer:
            return self._next_block(here.block, here.place)
        return [number + 1] if self._same_chunk(number, number + 1) else []

    def _previous(self, number: int) -> Sequence[int]:
        at_end_of_backward(self._end_backward)
        if not self._same_chunk(number, number - 1):
            return []
        block = self.linears[number - 1].block
        recomputed = block in self._recomputed and block != self.linears[number].block
        return [min(self._block(block)) if recomputed else number - 1]

    def _next_block(self, block: int, place: int) -> Sequence[int]:
        here, following = self._block(block), self._block(block + 1)
        goes_on = bool(following) and self._same_chunk(here[-1], following[0])
        return following if goes_on and place == self.overlap.launch_place else []

    def _same_chunk(self, number: int, other: int) -> bool:
        return 0 <= other < len(self.linears) and self.linears[number].chunk == self.linears[other].chunk

    def _block(self, block: int) -> Sequence[int]:
        return self._members.get(block, ())

    # -- gradients ----------------------------------------------------------------------------------------------------
    def reduce(self, number: int, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Sum the gradient of a whole weight, [O, I], over the group and have this rank's rows delivered: at once, or,
        with overlap, when the next gradient is there."""
        linear = self.linears[number]
        pending = begin_reduce_scatter(F.pad(dw, (0, 0, 0, -linear.rows % self.group.size)), self.group)
        if not self.overlap.enabled or not in_backward() or main_grad_of(linear.weight) is None:
            return deliver(pending.wait())  # put off, it comes after the backward pass
        self._deliver()
        self._delivery = lambda: deliver(pending.wait())
        at_end_of_backward(self._end_backward)
        return None

    def _begin_forward(self) -> None:
        """Forget what a pass that was broken off has left: weights, which may have changed since, and a gradient."""
        self._delivery = None
        self._give_up()

    def _deliver(self) -> None:
        if self._delivery is not None:
            self._delivery()
            self._delivery = None

    def _end_backward(self) -> None:
        """Deliver the last gradient, and give up what was fetched for a product that was not needed."""
        self._deliver()
        self._give_up()

    def _give_up(self) -> None:
        for number in list(self._coming):
            self._coming.pop(number).wait()
        for number in list(self._held):
            self.release(number)
