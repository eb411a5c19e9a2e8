"""Which part of a model a rank of a pipeline holds: a run of layers for each of its chunks. Pure.

As layers learn their sharding from the block they are built in, a model learns its part from it: see
:func:`internlm.core.parallel.sharding.building`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """``chunks``: numbers of the layers of each, counted in the whole model, which has ``layers``. The chunk that has
    the first layer also has the embedding, that with the last one the head. No chunk is empty."""

    layers: int
    chunks: tuple[range, ...]

    @classmethod
    def whole(cls, layers: int) -> Part:
        """All of a model, in one chunk."""
        return cls(layers, (range(layers),))

    def is_first(self, chunk: int) -> bool:
        """Whether ``chunk`` begins with token ids."""
        return self.chunks[chunk].start == 0

    def is_last(self, chunk: int) -> bool:
        """Whether ``chunk`` ends with the loss."""
        return self.chunks[chunk].stop == self.layers

    @property
    def has_embedding(self) -> bool:
        """Whether a chunk begins with token ids."""
        return any(map(self.is_first, range(len(self.chunks))))

    @property
    def has_head(self) -> bool:
        """Whether a chunk ends with the loss."""
        return any(map(self.is_last, range(len(self.chunks))))

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the model is elsewhere."""
        return sum(map(len, self.chunks)) == self.layers
