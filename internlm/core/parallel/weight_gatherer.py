"""All-gather of weights under isp: gather a weight before each matmul, release it afterwards, and prefetch the next.

Linears are indexed in the order in which they run, so the indices of one block are consecutive. A forward pass acquires
the weights of a chunk in ascending order (a model without a pipeline is one chunk), a backward pass in descending
order. Before the backward pass of a recomputed block, its weights are acquired in ascending order once more. A
prefetched weight is used in the same pass or released at its end, so that the weight does not change in between.

The gatherer detects a recomputation by checking whether autograd is running a backward pass, and registers a callback
for the end of the backward pass. Module hooks would be less reliable:

- A hook cannot distinguish a forward pass from a recomputation without state kept between hooks, and an exception
  between two hooks would leave that state wrong for the next pass.
- No backward hook of a module is guaranteed to be the last one: those of frozen blocks never run, and a full backward
  hook of a block whose input needs no gradient runs before the block's own backward.
- Hooks of the linears would be traced into a compiled block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import Pending, begin_all_gather, begin_reduce_scatter, pad_rows
from internlm.core.parallel.param_state import main_grad_of, wait_for_all_gather
from internlm.utils.torch_private import at_end_of_backward, in_backward

#: Position in a block at which the all-gathers of the next block are launched, by value of ``launch_allgather_before``:
#: that of a linear or a group of linears within the block; -1: the attention kernel.
LAUNCH_POSITIONS = {"wqkv": 0, "attn": -1, "wo": 1, "w1": 2}


@dataclass(frozen=True)
class Overlap:
    """Settings for overlapping weight communication with computation, from ``parallel.weight`` in the config."""

    enabled: bool = False
    per_layer: bool = True
    """Whether forward prefetches the whole next block. False: the next linear only, as backward always does."""
    launch_position: int = LAUNCH_POSITIONS["wo"]
    memory_pool: bool = False


@dataclass(frozen=True, kw_only=True)
class GatheredLinear:
    """Linear whose weight is gathered, with its position in the model."""

    weight: nn.Parameter
    """This rank's rows of the weight as a matrix, [⌈rows / ranks⌉, I]."""
    rows: int
    """Number of rows of the whole matrix, without padding."""
    block: int
    """Index of the block that contains the linear."""
    position: int
    """Index within the block of the linear, or of the group of linears with one input."""
    chunk: int = 0
    """Index of the chunk in the pipeline stage."""


class WeightGatherer:
    """Gatherer of the weights of one model, which also reduces their gradients over the weight group."""

    def __init__(self, group: Group, linears: Sequence[GatheredLinear], overlap: Overlap) -> None:
        self.group, self.linears, self.overlap = group, linears, overlap
        self._indices: dict[int, list[int]] = {}  # indices of the linears of each block
        for index, linear in enumerate(linears):
            self._indices.setdefault(linear.block, []).append(index)
        self.pool: dict[torch.Size, list[Tensor]] = {}  # free buffers
        self._in_use: dict[int, Tensor] = {}  # buffers of gathered weights, by index of the linear
        self._gathers: dict[int, Pending] = {}  # all-gathers in flight, by index of the linear
        self._delivery: Callable[[], object] | None = None
        self._recomputed: set[int] = set()  # blocks that a backward pass has recomputed

    # -- weights ------------------------------------------------------------------------------------------------------
    def acquire(self, index: int, backward: bool) -> Tensor:
        """Return the whole weight of a linear, [O, I], and start prefetching the next weight.

        Each weight must be released before it is acquired again.

        Args:
            index: Index of the linear.
            backward: True for the matmul that computes dx, False for the forward matmul.
        """
        if not backward and not in_backward() and not self._same_chunk(index, index - 1):
            self._begin_forward()
        self._prefetch([index])
        whole = self._gathers.pop(index).wait()
        if self.overlap.enabled:
            self._prefetch(self._next(index, backward))
        return whole[: self.linears[index].rows]

    def release(self, index: int) -> None:
        """Release the gathered weight of linear ``index``; its buffer returns to the memory pool, if there is one."""
        buffer = self._in_use.pop(index)
        if self.overlap.memory_pool:
            self.pool.setdefault(buffer.shape, []).append(buffer)

    def before_attention(self, block: int) -> None:
        """Prefetch the weights of the block after ``block`` if prefetching is set to start at the attention kernel."""
        if self.overlap.enabled and self.overlap.per_layer and not in_backward():
            self._prefetch(self._next_block(block, LAUNCH_POSITIONS["attn"]))

    def _prefetch(self, indices: Sequence[int]) -> None:
        for index in indices:
            if index not in self._gathers:
                assert index not in self._in_use, f"weight {index} is acquired twice"
                shard = wait_for_all_gather(self.linears[index].weight).detach()
                self._in_use[index] = self._new_buffer(shard)
                self._gathers[index] = begin_all_gather(shard, self.group, self._in_use[index])

    def _new_buffer(self, shard: Tensor) -> Tensor:
        shape = torch.Size((shard.shape[0] * self.group.size, shard.shape[1]))
        free = self.pool.get(shape)
        return free.pop() if free else shard.new_empty(shape)

    def _next(self, index: int, backward: bool) -> Sequence[int]:
        """Return the indices of the linears whose weights to prefetch while the weight of ``index`` is in use."""
        linear = self.linears[index]
        if backward:
            return self._previous(index)
        if in_backward():  # the block is recomputed, up to its last linear
            self._recomputed.add(linear.block)
            return [n for n in [index + 1] if n in self._block(linear.block)]
        if self.overlap.per_layer:
            return self._next_block(linear.block, linear.position)
        return [index + 1] if self._same_chunk(index, index + 1) else []

    def _previous(self, index: int) -> Sequence[int]:
        # The previous linear may be frozen, or no earlier tensor may need a gradient: then its weight is not acquired.
        at_end_of_backward(self._end_backward)
        if not self._same_chunk(index, index - 1):
            return []
        block = self.linears[index - 1].block
        # A recomputed block begins with its first linear. A block counts as recomputed after its first backward.
        recomputed = block in self._recomputed and block != self.linears[index].block
        return [min(self._block(block)) if recomputed else index - 1]

    def _next_block(self, block: int, position: int) -> Sequence[int]:
        here, following = self._block(block), self._block(block + 1)
        continues = bool(following) and self._same_chunk(here[-1], following[0])
        return following if continues and position == self.overlap.launch_position else []

    def _same_chunk(self, index: int, other: int) -> bool:
        # Chunks of a pipeline stage run at different times: a prefetch across them would hold a buffer in between.
        return 0 <= other < len(self.linears) and self.linears[index].chunk == self.linears[other].chunk

    def _block(self, block: int) -> Sequence[int]:
        return self._indices.get(block, ())

    # -- gradients ----------------------------------------------------------------------------------------------------
    def reduce(self, index: int, dw: Tensor, deliver: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Start the reduce-scatter of a whole weight's gradient, and pass this rank's rows to ``deliver``.

        With overlap, the rows are delivered with the next gradient, so that the reduce-scatter overlaps with the
        matmuls in between. There are two exceptions, which are delivered immediately: a gradient deferred by a
        zero-bubble schedule, which is computed after the backward pass, and the gradient of a weight without a main
        gradient, which must be returned to autograd.

        Args:
            index: Index of the linear.
            dw: Gradient of the whole weight, [O, I].
            deliver: Function that adds the rows to the main gradient, or returns them if there is no main gradient.

        Returns:
            The result of ``deliver``, or None if it is called later.
        """
        linear = self.linears[index]
        pending = begin_reduce_scatter(pad_rows(dw, self.group), self.group)
        if not self.overlap.enabled or not in_backward() or main_grad_of(linear.weight) is None:
            return deliver(pending.wait())
        self._deliver()
        self._delivery = lambda: deliver(pending.wait())
        at_end_of_backward(self._end_backward)
        return None

    def _begin_forward(self) -> None:
        """Discard what is left of a pass that raised an exception: possibly outdated weights and a pending gradient."""
        self._delivery = None
        self._release_all()

    def _deliver(self) -> None:
        if self._delivery is not None:
            self._delivery()
            self._delivery = None

    def _end_backward(self) -> None:
        """Deliver the last gradient, and release prefetched weights that were not used."""
        # Registered several times per backward pass; all calls but the first are no-ops.
        self._deliver()
        self._release_all()

    def _release_all(self) -> None:
        for index in list(self._gathers):
            self._gathers.pop(index).wait()  # the collective still writes into the buffer
        for index in list(self._in_use):
            self.release(index)
