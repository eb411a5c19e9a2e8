"""Splitting of a model over ranks: layers over pipeline stages, parameters over tensor or weight groups. Pure.

Which shard of a parameter a rank holds follows from the tensor mode and the *role* of the layer, the place that a
layer has in a decoder (Shoeybi et al. 2019, arXiv 1909.08053, section 3; Chen et al. 2024, arXiv 2401.09149):

=============  =====================================================================================
``column``     a linear whose output is split: query/key/value, gate and up projection
``row``        a linear whose input is split: the projections that write into the residual stream
``head``       the linear from hidden states to the vocabulary
``embedding``  the table from the vocabulary to hidden states
``replicated`` vectors that every rank holds whole: norms, biases of row linears
=============  =====================================================================================

Layers read the :class:`Sharding` and models the :class:`StageLayers` of the enclosing :func:`building` block, as they
read torch's default dtype and device, so that a user's model needs no arguments to be split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from internlm.config.schema.parallel import TensorMode as TensorMode
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.param_state import has_placement, set_placement
from internlm.core.parallel.placement import Init, ParamPlacement, ShardSpec
from internlm.utils.errors import Problem, UserError

#: Roles of the layers of this package; a layer of your own may have another (:data:`CUSTOM_ROLES`).
Role: TypeAlias = Literal["column", "row", "head", "embedding", "embedding by hidden units", "attention", "model"]

#: Modes that split the activations between the linears along the sequence.
SEQUENCE_MODES: tuple[TensorMode, ...] = ("msp", "fsp", "isp")

#: Roles registered by users, and the role whose weights each is split like.
CUSTOM_ROLES: dict[str, Role] = {}

# -- pipeline stages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageLayers:
    """The layers that a pipeline stage holds.

    The chunk with the first layer also holds the embedding, the one with the last layer also the head.
    """

    layers: int
    """Number of layers of the whole model."""
    chunks: tuple[range, ...]
    """Indices of the layers of each chunk, counted in the whole model. No chunk is empty."""

    @classmethod
    def whole(cls, layers: int) -> StageLayers:
        """Return all layers of a model as one chunk."""
        return cls(layers, (range(layers),))

    def is_first(self, chunk: int) -> bool:
        """Whether the input of ``chunk`` is token ids."""
        return self.chunks[chunk].start == 0

    def is_last(self, chunk: int) -> bool:
        """Whether the output of ``chunk`` is the loss or logits."""
        return self.chunks[chunk].stop == self.layers

    @property
    def has_embedding(self) -> bool:
        """Whether a chunk holds the embedding."""
        return any(map(self.is_first, range(len(self.chunks))))

    @property
    def has_head(self) -> bool:
        """Whether a chunk holds the head."""
        return any(map(self.is_last, range(len(self.chunks))))

    @property
    def is_whole(self) -> bool:
        """Whether the stage holds every layer of the model."""
        return sum(map(len, self.chunks)) == self.layers


# -- shards of parameters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupPosition:
    """A rank within a group of ``size`` ranks."""

    rank: int = 0
    size: int = 1


#: The position in a group of one rank.
ALONE = GroupPosition()


@dataclass(frozen=True)
class Sharding:
    """A tensor mode, and the position of this rank in the groups over which the mode splits parameters."""

    mode: TensorMode = "mtp"
    tensor: GroupPosition = ALONE
    weight: GroupPosition = ALONE

    def weight_of(self, role: str, shape: tuple[int, ...], init: Init, axis: int = 0) -> ParamPlacement:
        """Return the placement of a layer's weight.

        Args:
            role: role of the layer, one of :data:`Role` or :data:`CUSTOM_ROLES`.
            shape: of the whole weight, the input features last.
            init: draws the initial values.
            axis: dimension by which mtp, msp and fsp split the weight of a ``column``.

        Raises:
            UserError: the role is neither built in nor registered.
        """
        like = CUSTOM_ROLES.get(role, role)
        hidden = like in ("column", "row")
        if self.mode == "isp":
            # Rows of the weight as a matrix, whatever the role: any size then divides any weight.
            shard = self._shard(ParallelMode.WEIGHT, self.weight, None)
            return ParamPlacement(shape, init, shard=shard, is_hidden=hidden)
        # None splits the rows as well, so that a vocabulary which the group does not divide is padded.
        axes = {"column": axis, "row": len(shape) - 1, "head": None, "embedding": None, "embedding by hidden units": 1}
        if like not in axes:
            known = ", ".join(["column", "row", "head", *CUSTOM_ROLES])
            raise UserError(Problem("role", f"{role!r} is unknown (known: {known})", "Register it with like='column'"))
        shard = self._shard(ParallelMode.TENSOR, self.tensor, axes[like])
        return ParamPlacement(shape, init, shard=shard, is_hidden=hidden)

    def bias_of(self, role: str, shape: tuple[int, ...], init: Init, axis: int = 0) -> ParamPlacement:
        """Return the placement of a bias: split with the outputs of a ``column`` except under isp, else whole."""
        if CUSTOM_ROLES.get(role, role) == "column" and self.mode != "isp":
            shard = self._shard(ParallelMode.TENSOR, self.tensor, axis)
            return ParamPlacement(shape, init, shard=shard, is_matrix=False)
        return self.replicated(shape, init)

    def replicated(self, shape: tuple[int, ...], init: Init) -> ParamPlacement:
        """Return the placement of a vector over the hidden dimension that every rank holds whole: of a norm, a bias.

        Each rank applies it to its own tokens. Where the tokens of a row are split over ranks, each rank's gradient is
        one term of a sum over them (arXiv 2205.05198, section 4.2). isp names the weight group: its ranks differ in
        tokens or in samples.

        A vector that a rank applies to its own heads or features (QK-norm) needs another placement under mtp, where
        ``partial_over`` is None here: its gradient is a partial sum over the tensor group in every mode but isp.
        """
        partial = {"mtp": None, "msp": ParallelMode.TENSOR, "fsp": ParallelMode.TENSOR, "isp": ParallelMode.WEIGHT}
        return ParamPlacement(shape, init, partial_over=partial[self.mode], is_matrix=False)

    def foreign(self, shape: tuple[int, ...], is_matrix: bool) -> ParamPlacement:
        """Return the placement of a parameter whose module is not parallel, such as one of ``torch.nn``.

        Every rank holds it whole and applies it to all tokens that the loader gives the rank. Under mtp, msp and fsp
        these are the same on all ranks of the tensor group, and so is the gradient. Its module has set its values.
        """
        partial = ParallelMode.WEIGHT if self.mode == "isp" else None
        return ParamPlacement(shape, None, partial_over=partial, is_matrix=is_matrix)

    @staticmethod
    def _shard(mode: ParallelMode, position: GroupPosition, axis: int | None) -> ShardSpec | None:
        return ShardSpec(mode, position.rank, position.size, axis) if position.size > 1 else None


# -- the model being built --------------------------------------------------------------------------------------------

_current: tuple[Sharding, StageLayers | None] = Sharding(), None


def current_sharding() -> Sharding:
    """Return the sharding of the enclosing :func:`building` block; outside of one, of a rank that is alone."""
    return _current[0]


def current_stage_layers(layers: int) -> StageLayers:
    """Return which of a model's ``layers`` this pipeline stage builds; all of them where there is no pipeline.

    A model that calls this can be split into stages: it keeps the result as its attribute ``stage_layers``, and its
    ``forward`` takes ``chunk`` and ``hidden`` (:mod:`internlm.core.scheduler.compute`).
    """
    return _current[1] or StageLayers.whole(layers)


@contextmanager
def building(sharding: Sharding, stage_layers: StageLayers | None = None) -> Iterator[None]:
    """Let layers that are built within the block read ``sharding``, and models read ``stage_layers``."""
    global _current
    outer, _current = _current, (sharding, stage_layers)
    try:
        yield
    finally:
        _current = outer


def place_replicated(module: nn.Module) -> nn.Module:
    """Place every parameter of ``module`` that has no placement as one that each rank holds whole.

    The values stay as they are. It is right for modules that see all tokens that the loader gives their rank; under msp
    and fsp those between parallel layers do not: use :class:`ParallelNorm` and the like there.
    """
    for parameter in module.parameters():
        if not has_placement(parameter):
            shape = tuple(parameter.shape)
            set_placement(parameter, current_sharding().foreign(shape, parameter.dim() > 1))
    return module
