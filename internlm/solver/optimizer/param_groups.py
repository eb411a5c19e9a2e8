"""The groups of ranks that an optimizer talks to.

Which parameters are trained alike, and so lie in one flat buffer.

What update rules, the gradient norm and checkpoints know of the parameters of one kind, wherever they lie.

Of the elements that it owns, its *shard*, a rank has main parameters, gradients that are reduced, and the state of the
optimizer. A shard comes in parts. What is kept for it besides is one tensor, in which the parts lie side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, OptimizerConfig, ParamGroupConfig
from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.param_state import compute_dtype, placed_parameters
from internlm.core.parallel.placement import ParamPlacement
from internlm.utils.dtype import wide
from internlm.utils.errors import ConfigError, Problem, UserError

#: A rank that shares its state with nobody.
ALONE = Group(ParallelMode.ZERO1)


@dataclass(frozen=True)
class ProcessGroups:
    """``zero`` shares one copy of the optimizer's state, ``replica`` joins the ranks that hold the same shard of it;
    ``split`` are the groups over which parameters are split, or gradients of whole ones still partial sums;
    ``pipeline`` joins the stages, ``ends`` the first and the last, which may share an embedding."""

    zero: Group = ALONE
    replica: Group = ALONE
    split: tuple[Group, ...] = ()
    pipeline: Group = NO_PIPELINE
    ends: Group = NO_PIPELINE

    @property
    def by_split(self) -> Mapping[ParallelMode, Group]:
        """Those over which parameters are split."""
        return {group.mode: group for group in self.split}

    def of_partial(self, mode: ParallelMode) -> Group:
        """The group over which gradients are partial sums that are ``partial_over`` a mode."""
        return self.ends if mode is ParallelMode.PIPELINE else self.by_split[mode]


class NamedParameter(NamedTuple):
    """A parameter of the model, and the how many-eth of it that it is."""

    name: str
    parameter: nn.Parameter
    placement: ParamPlacement
    place: int = 0


@dataclass(frozen=True)
class ParamGroupKey:
    """What parameters of one flat buffer have in common."""

    dtype: torch.dtype
    rule: str  # see internlm.solver.optimizer.update_rules
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    #: Over which they are split, and over which their gradients are still partial sums.
    split_over: ParallelMode | None = None
    partial_over: ParallelMode | None = None

    @property
    def needs_matrices(self) -> bool:
        """Whether a rank must own whole parameters."""
        return self.rule == "Muon"


def param_group_key(
    name: str, placement: ParamPlacement, dtype: torch.dtype, adam: AdamConfig, optimizer: OptimizerConfig
) -> ParamGroupKey:
    """How the parameter of that name is trained."""
    group = next((each for each in optimizer.param_groups if re.search(each.pattern, name)), None)
    decays = placement.is_matrix or adam.decay_norm_and_bias
    decay = group.weight_decay if group and group.weight_decay is not None else adam.weight_decay * decays
    return ParamGroupKey(
        dtype,
        _rule(name, placement, group, optimizer),
        float(decay),
        float(group.lr_scale) if group else 1.0,
        placement.shard.mode if placement.shard else None,
        placement.partial_over,
    )


def _rule(name: str, placement: ParamPlacement, group: ParamGroupConfig | None, optimizer: OptimizerConfig) -> str:
    if group and group.type:
        if group.type == "Muon" and not placement.is_matrix:
            what = f"{group.pattern!r} gives {name!r} to Muon, which is no matrix"
            raise ConfigError(Problem("optimizer.param_groups", what, "Give it another type"))
        return group.type
    return "AdamW" if optimizer.type == "Muon" and not placement.is_hidden else optimizer.type


def build_param_groups(
    model: nn.Module, adam: AdamConfig, optimizer: OptimizerConfig
) -> dict[ParamGroupKey, list[NamedParameter]]:
    """The trainable parameters of each kind, in the order of the model."""
    kinds: dict[ParamGroupKey, list[NamedParameter]] = {}
    for place, (name, parameter, placement) in enumerate(placed_parameters(model)):
        if parameter.requires_grad:
            kind = param_group_key(name, placement, compute_dtype(parameter), adam, optimizer)
            kinds.setdefault(kind, []).append(NamedParameter(name, parameter, placement, place))
    return kinds


@dataclass(frozen=True)
class ShardSlice:
    """The part of one parameter's flattened local tensor that lies in a shard: elements [start, stop), and [lo, hi) of
    part ``number``."""

    name: str
    placement: ParamPlacement
    start: int
    stop: int
    number: int
    lo: int
    hi: int


class ParamGroup:
    """Parameters of one kind, and this rank's shard of them."""

    kind: ParamGroupKey
    #: Where gradients are added up, whether this rank owns them or not.
    grads: Tensor
    #: Main parameters of the shard.
    main_parts: list[Tensor]
    #: Gradients of the shard, once they are reduced.
    grad_parts: list[Tensor]

    @property
    def main_dtype(self) -> torch.dtype:
        """Type of main parameters, reduced gradients and the optimizer's state."""
        return wide(self.kind.dtype)

    @property
    def has_main(self) -> bool:
        """Whether main parameters are wider than what is computed with."""
        return self.kind.dtype != self.main_dtype

    @property
    def owned(self) -> int:
        """Elements of the shard."""
        return sum(map(len, self.main_parts))

    def new_state(self) -> Tensor:
        """Zeros for each element of the shard."""
        return torch.zeros(self.owned, dtype=self.main_dtype, device=self.main_parts[0].device)

    def split(self, state: Tensor) -> list[Tensor]:
        """The parts of one tensor over the shard, as views."""
        return list(state.split([*map(len, self.main_parts)]))

    def pieces(self) -> Iterator[ShardSlice]:
        """Which parts of which parameters the shard holds, in its order."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """The gradient of each parameter as this rank has it before :class:`HybridZeroOptimizer` reduces it, with the
        parameter's place in the model and its name."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Forget the gradients. Raises :class:`UserError` where the whole model was moved to other memory."""
        name, parameter, memory = self._first()
        if local_shard(parameter).flat.data_ptr() != memory.data_ptr():
            what = f"{name!r} does not lie where the optimizer put it, so updates would not reach it"
            raise UserError(Problem("model", what, "Call model.to() or .half() before the optimizer is made"))
        self.grads.zero_()

    def _first(self) -> tuple[str, Tensor, Tensor]:
        """Name of the first parameter, the parameter itself, and the memory that it had when the group was made."""
        raise NotImplementedError

    def copy_main_to_params(self) -> None:
        """Round wider main parameters into this rank's shard of what is computed with, if it is kept."""

    def copy_params_to_main(self) -> None:
        """The inverse, after the others were set."""
