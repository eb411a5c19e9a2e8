"""Split of a model over ranks: layers over pipeline stages, parameters over the tensor or the weight group.

The tensor mode and the *role* of a layer, its function in a decoder, determine which shard of a parameter a rank holds
(Shoeybi et al. 2019, arXiv 1909.08053, section 3; Chen et al. 2024, arXiv 2401.09149):

=============  =====================================================================================
``column``     a linear whose output is split: query/key/value, gate and up projection
``row``        a linear whose input is split: the projections that write into the residual stream
``head``       the linear from hidden states to the vocabulary
``embedding``  the table from the vocabulary to hidden states
``replicated`` what every rank holds whole: norms, biases of row linears, small linears of adapters
=============  =====================================================================================

The context manager :func:`building` sets the :class:`Sharding` that layers read, and the :class:`StageLayers` that
models read. Like torch's default dtype and device, they are not passed as arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import nn

from internlm.config.schema.parallel import TensorMode as TensorMode
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.param_state import has_placement, set_placement
from internlm.core.parallel.placement import Init, ParamPlacement, ShardSpec
from internlm.utils.errors import Problem, UserError

#: Built-in roles of layers; users may register others (:data:`CUSTOM_ROLES`).
Role: TypeAlias = Literal[
    "column", "row", "head", "embedding", "embedding by hidden units", "attention", "heads", "model", "replicated"
]

#: Modes that split the activations between the linears along the sequence.
SEQUENCE_MODES: tuple[TensorMode, ...] = ("msp", "fsp", "isp")

#: Roles registered by users, each with the built-in role according to which its weights are split.
CUSTOM_ROLES: dict[str, Role] = {}

# -- pipeline stages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageLayers:
    """Layers that a pipeline stage holds, by chunk.

    The chunk with the first layer also holds the embedding, the chunk with the last layer also the head.
    """

    layers: int
    """Number of layers of the whole model."""
    chunks: tuple[range, ...]
    """Indices of the layers of each chunk, counted in the whole model. No chunk is empty."""

    @classmethod
    def whole(cls, layers: int) -> StageLayers:
        """Return the stage layers of a model without a pipeline: all ``layers`` layers in one chunk."""
        return cls(layers, (range(layers),))

    def is_first(self, chunk: int) -> bool:
        """Return whether ``chunk`` begins with the first layer, so that its input is token ids."""
        return self.chunks[chunk].start == 0

    def is_last(self, chunk: int) -> bool:
        """Return whether ``chunk`` ends with the last layer, so that its output is the loss or logits."""
        return self.chunks[chunk].stop == self.layers

    @property
    def has_embedding(self) -> bool:
        """Whether a chunk of the stage holds the embedding."""
        return any(map(self.is_first, range(len(self.chunks))))

    @property
    def has_head(self) -> bool:
        """Whether a chunk of the stage holds the head."""
        return any(map(self.is_last, range(len(self.chunks))))

    @property
    def is_whole(self) -> bool:
        """Whether the stage holds every layer of the model."""
        return sum(map(len, self.chunks)) == self.layers


# -- shards of parameters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupPosition:
    """Position of this rank in a process group of ``size`` ranks."""

    rank: int = 0
    size: int = 1


#: Position in a group of one rank.
ALONE = GroupPosition()


@dataclass(frozen=True)
class Sharding:
    """Tensor mode, and the positions of this rank in the groups over which the mode splits parameters."""

    mode: TensorMode = "mtp"
    tensor: GroupPosition = ALONE
    weight: GroupPosition = ALONE

    def weight_of(self, role: str, shape: tuple[int, ...], init: Init, axis: int = 0) -> ParamPlacement:
        """Return the placement of a layer's weight.

        Args:
            role: Role of the layer, one of :data:`Role` or :data:`CUSTOM_ROLES`.
            shape: Shape of the whole weight, with the input features last.
            init: Distribution of the initial values.
            axis: Axis along which mtp, msp and fsp split the weight of a column linear.

        Raises:
            UserError: The role is neither built in nor registered.
        """
        like = CUSTOM_ROLES.get(role, role)
        if like == "replicated":
            return replace(self.replicated(shape, init), is_matrix=True, is_hidden=True)
        hidden = like in ("column", "row")
        if self.mode == "isp":
            # Rows of the weight as a matrix, padded if necessary: any group can split a weight of any role.
            shard = self._shard(ParallelMode.WEIGHT, self.weight, None)
            return ParamPlacement(shape, init, shard=shard, is_hidden=hidden)
        # None also splits the rows, but pads a vocabulary that is not divisible by the group size.
        axes = {"column": axis, "row": len(shape) - 1, "head": None, "embedding": None, "embedding by hidden units": 1}
        if like not in axes:
            known = ", ".join(["column", "row", "head", *CUSTOM_ROLES])
            todo = f"Register it with register_communicator(mode, {role!r}, like='column') before building the model"
            raise UserError(Problem(f"layer role {role!r}", f"unknown, expected one of {known}", todo))
        shard = self._shard(ParallelMode.TENSOR, self.tensor, axes[like])
        return ParamPlacement(shape, init, shard=shard, is_hidden=hidden)

    def bias_of(self, role: str, shape: tuple[int, ...], init: Init, axis: int = 0) -> ParamPlacement:
        """Return the placement of a bias, which is split only for a column linear under mtp, msp and fsp."""
        if CUSTOM_ROLES.get(role, role) == "column" and self.mode != "isp":
            shard = self._shard(ParallelMode.TENSOR, self.tensor, axis)
            return ParamPlacement(shape, init, shard=shard, is_matrix=False)
        return self.replicated(shape, init)

    def replicated(self, shape: tuple[int, ...], init: Init) -> ParamPlacement:
        """Return the placement of a replicated vector over the hidden dimension, such as a norm's weight.

        Every rank holds the whole vector and applies it to its own tokens. Under msp and fsp, which split a sequence
        over the tensor group, the gradient of each rank is a partial sum over this group (arXiv 2205.05198, section
        4.2). Under isp it is a partial sum over the weight group, whose ranks hold different tokens or samples.

        Do not use this placement for a vector that a rank applies to its own heads or features: see :meth:`per_head`.
        """
        partial = {"mtp": None, "msp": ParallelMode.TENSOR, "fsp": ParallelMode.TENSOR, "isp": ParallelMode.WEIGHT}
        return ParamPlacement(shape, init, partial_over=partial[self.mode], is_matrix=False)

    def per_head(self, shape: tuple[int, ...], init: Init) -> ParamPlacement:
        """Return the placement of a vector that is applied to each head, such as that of a QK-norm.

        Every rank holds the whole vector. Under mtp, msp and fsp it applies the vector to its own heads, so the
        gradient is a partial sum over the tensor group. Under isp it has all heads of its own tokens.
        """
        partial = ParallelMode.WEIGHT if self.mode == "isp" else ParallelMode.TENSOR
        return ParamPlacement(shape, init, partial_over=partial, is_matrix=False)

    def foreign(self, shape: tuple[int, ...], is_matrix: bool) -> ParamPlacement:
        """Return the placement of a parameter whose module is not a parallel layer, such as ``torch.nn.Linear``.

        Every rank holds the whole parameter and applies it to all tokens from its loader. Under mtp, msp and fsp these
        tokens, and hence the gradient, are the same on all ranks of the tensor group. The parameter keeps its values.
        """
        partial = ParallelMode.WEIGHT if self.mode == "isp" else None
        return ParamPlacement(shape, None, partial_over=partial, is_matrix=is_matrix)

    @staticmethod
    def _shard(mode: ParallelMode, position: GroupPosition, axis: int | None) -> ShardSpec | None:
        return ShardSpec(mode, position.rank, position.size, axis) if position.size > 1 else None


# -- the model being built --------------------------------------------------------------------------------------------

_current: tuple[Sharding, StageLayers | None] = Sharding(), None


def current_sharding() -> Sharding:
    """Return the sharding set by the enclosing :func:`building` context; by default, the sharding of a single rank."""
    return _current[0]


def current_stage_layers(layers: int) -> StageLayers:
    """Return the layers of this pipeline stage for a model of ``layers`` layers; without a pipeline, all of them.

    A model that can be split into stages calls this function, stores the result in its attribute ``stage_layers``, and
    takes the arguments ``chunk`` and ``hidden`` in its ``forward`` (:mod:`internlm.core.scheduler.compute`).
    """
    return _current[1] or StageLayers.whole(layers)


@contextmanager
def building(sharding: Sharding, stage_layers: StageLayers | None = None) -> Iterator[None]:
    """Set the sharding and the stage layers of all models and layers that are built in the ``with`` block."""
    global _current
    outer, _current = _current, (sharding, stage_layers)
    try:
        yield
    finally:
        _current = outer


def place_replicated(module: nn.Module) -> nn.Module:
    """Mark the parameters of ``module`` as replicated on all ranks, unless they have a placement; return ``module``.

    The values are unchanged. The module must process all tokens from the loader. Under msp and fsp, a module between
    parallel layers processes only some of them: use a layer such as :class:`ParallelNorm` instead.
    """
    for parameter in module.parameters():
        if not has_placement(parameter):
            shape = tuple(parameter.shape)
            set_placement(parameter, current_sharding().foreign(shape, parameter.dim() > 1))
    return module
