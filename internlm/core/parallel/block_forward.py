"""Activation checkpointing and offloading, applied to the blocks of a model from outside.

The ``forward`` of a declared block is replaced; the module, its name, hooks and parameters are unchanged. Hooks of the
block itself, such as those of ``fully_shard``, are not part of the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internlm.core.parallel.blocks import declared_blocks
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.offload import ChunkOffload, tensors_of
from internlm.core.parallel.sharding import StageLayers


@dataclass(eq=False, kw_only=True)
class BlockForward:
    """Replacement for a block's forward: the original, ``compute``, with checkpointing, offloading or both."""

    block: nn.Module
    compute: Callable[..., Any]
    recompute: bool
    offload: ChunkOffload | None
    position: int
    """Index of the block in its chunk."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; if gradients are disabled, run only the original forward."""
        if not torch.is_grad_enabled():
            return self.compute(*args, **kwargs)
        run = partial(self._checkpointed if self.recompute else self.compute, *args, **kwargs)
        if self.offload is None:
            return run()
        # Offloading wraps the checkpoint, so that its saved inputs are offloaded too.
        device = next(tensors_of((args, kwargs))).device
        return self.offload.run(self.position, run, device, self._kept(args, kwargs))

    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        # A block that draws nothing from the default generators (our dropout masks are functions of their position)
        # need not restore their state, so its checkpoint holds only its inputs.
        restores = not getattr(self.block, "draws_nothing", False)
        return checkpoint(self.compute, *args, use_reentrant=False, preserve_rng_state=restores, **kwargs)

    def _kept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """Yield the tensors to exclude from offloading: the parameters of the block and some of its inputs.

        These tensors stay on the device in any case, so offloading them would free no memory.
        """
        first, *others = tensors_of((args, kwargs))
        yield from others  # all blocks share them: rotary tables, sequence boundaries
        if first.requires_grad and first.is_leaf:
            yield first  # received from another pipeline stage; the scheduler keeps it for its gradient
        for parameter in self.block.parameters():
            yield local_shard(parameter).flat


def checkpoint_and_offload_blocks(model: nn.Module, recomputes: Callable[[int], bool], offloaded: int) -> None:
    """Apply activation checkpointing and offloading to the blocks that ``model`` declares.

    Args:
        model: Model that declares blocks. Its attribute ``stage_layers`` assigns them to chunks; without it, they form
            one chunk.
        recomputes: Function from the index of a block in the whole model to whether the block saves only its inputs
            and is recomputed in backward (arXiv 1604.06174).
        offloaded: Number of blocks at the start of each chunk whose saved tensors are offloaded to host memory.
    """
    for indexes, blocks in _chunks(model):
        offload = ChunkOffload(len(blocks), offloaded) if offloaded else None
        for position, (index, block) in enumerate(zip(indexes, blocks, strict=True)):
            own = offload if position <= offloaded else None  # one more block, which prefetches for the last offloaded
            if own is not None or recomputes(index):
                block.forward = BlockForward(
                    block=block, compute=block.forward, recompute=recomputes(index), offload=own, position=position
                )


def _chunks(model: nn.Module) -> Iterator[tuple[range, Sequence[nn.Module]]]:
    """Yield, for each chunk, the indices of its blocks in the whole model and the blocks themselves."""
    blocks = list(declared_blocks(model).values())
    stage_layers = getattr(model, "stage_layers", None)
    if stage_layers is None or sum(map(len, stage_layers.chunks)) != len(blocks):
        stage_layers = StageLayers.whole(len(blocks))
    for indexes in stage_layers.chunks:
        yield indexes, [blocks.pop(0) for _ in indexes]
