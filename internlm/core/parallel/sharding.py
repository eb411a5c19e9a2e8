"""Which part of a model a rank of a pipeline holds: a run of layers for each of its chunks. Pure.

As layers learn their sharding from the block they are built in, a model learns its part from it: see
:func:`internlm.core.parallel.sharding.building`.

Which part of a parameter this rank holds: a table by mode and role. No process group is needed.

A *role* says what a layer is to the parallel modes:

=============  =====================================================================================
``column``     a linear whose output is split: query/key/value, gate and up projection
``row``        a linear whose input is split: the projections that write into the residual stream
``head``       the linear from hidden units to the vocabulary
``embedding``  the table from the vocabulary to hidden units
``replicated`` whatever each rank holds whole: norms, biases of row linears
=============  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.param_state import has_placement, set_placement
from internlm.core.parallel.placement import Init, ParamPlacement, ShardSpec
from internlm.utils.errors import Problem, UserError


@dataclass(frozen=True)
class StageLayers:
    """``chunks``: numbers of the layers of each, counted in the whole model, which has ``layers``. The chunk that has
    the first layer also has the embedding, that with the last one the head. No chunk is empty."""

    layers: int
    chunks: tuple[range, ...]

    @classmethod
    def whole(cls, layers: int) -> StageLayers:
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


#: Modes that split activations outside the linears along the sequence.
SEQUENCE_MODES = ("msp", "fsp", "isp")


@dataclass(frozen=True)
class GroupPosition:
    """Place ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Sharding:
    """A mode, and this rank's place in the groups that it uses."""

    mode: str = "mtp"
    tensor: GroupPosition = GroupPosition()
    weight: GroupPosition = GroupPosition()

    def weight_of(self, role: str, shape: tuple[int, ...], init: Init, axis: int = 0) -> ParamPlacement:
        """Placement of the weight of a layer in ``role``; ``axis`` is the one by which mtp, msp and fsp split a
        ``column``."""
        hidden = LIKE.get(role, role) in ("column", "row")
        if self.mode == "isp":
            shard = self._shard(ParallelMode.WEIGHT, self.weight, None)
            return ParamPlacement(shape, init, shard=shard, is_hidden=hidden)
        axes = {"column": axis, "row": len(shape) - 1, "head": None, "embedding": None, "embedding by hidden units": 1}
        role = LIKE.get(role, role)
        if role not in axes:
            known = ", ".join(["column", "row", "head", *LIKE])
            raise UserError(Problem("role", f"{role!r} is unknown (known: {known})", "Register it with like='column'"))
        shard = self._shard(ParallelMode.TENSOR, self.tensor, axes[role])
        return ParamPlacement(shape, init, shard=shard, is_hidden=hidden)

    def bias_of(self, role: str, shape: tuple[int, ...], init: Init, axis: int = 0) -> ParamPlacement:
        """Placement of a bias: split like the output that it is added to, or whole."""
        if LIKE.get(role, role) == "column" and self.mode != "isp":
            shard = self._shard(ParallelMode.TENSOR, self.tensor, axis)
            return ParamPlacement(shape, init, shard=shard, is_matrix=False)
        return self.replicated(shape, init)

    def replicated(self, shape: tuple[int, ...], init: Init) -> ParamPlacement:
        """Placement of a vector that every rank holds whole, and applies to the tokens that it has."""
        partial = {"mtp": None, "msp": ParallelMode.TENSOR, "fsp": ParallelMode.TENSOR, "isp": ParallelMode.WEIGHT}
        return ParamPlacement(shape, init, partial_over=partial[self.mode], is_matrix=False)

    @staticmethod
    def _shard(mode: ParallelMode, share: GroupPosition, axis: int | None) -> ShardSpec | None:
        return ShardSpec(mode, share.rank, share.size, axis) if share.size > 1 else None

    def foreign(self, shape: tuple[int, ...], is_matrix: bool) -> ParamPlacement:
        """Placement of a parameter of a module that knows nothing of all this: every rank holds it whole, and applies
        it to all tokens that the loader gives it."""
        partial = ParallelMode.WEIGHT if self.mode == "isp" else None
        return ParamPlacement(shape, None, partial_over=partial, is_matrix=is_matrix)


#: Of a rank that shares nothing.
ALONE = GroupPosition()

#: Roles of users' own, and which of ours each is like.
LIKE: dict[str, str] = {}

_current: tuple[Sharding, StageLayers | None] = Sharding(), None


def current_sharding() -> Sharding:
    """That of the layers being built."""
    return _current[0]


def current_stage_layers(layers: int) -> StageLayers:
    """That of the model being built, which has ``layers`` in all; outside of a pipeline all of them.

    A model that asks for its part can be split into stages: it keeps it as its attribute ``part``, and its forward
    takes ``chunk`` and ``hidden`` as told in :mod:`internlm.core.scheduler.compute`.
    """
    return _current[1] or StageLayers.whole(layers)


@contextmanager
def building(sharding: Sharding, part: StageLayers | None = None) -> Iterator[None]:
    """Layers that are built within the block place their parameters by ``sharding``, however deep they lie; of a model
    that is split into stages, ``part`` is built."""
    global _current
    outer, _current = _current, (sharding, part)
    try:
        yield
    finally:
        _current = outer


def place_replicated(module: nn.Module) -> nn.Module:
    """Mark every parameter of ``module`` that has no placement as held whole by each rank, its values as they are.

    For modules that see all the tokens which the loader gives their rank. Under msp and fsp that is not so between
    parallel layers, which have split them: use :class:`ParallelNorm` and the like there.
    """
    for parameter in module.parameters():
        if not has_placement(parameter):
            shape = tuple(parameter.shape)
            set_placement(parameter, current_sharding().foreign(shape, parameter.dim() > 1))
    return module
