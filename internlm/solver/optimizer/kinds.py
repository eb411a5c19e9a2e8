"""Which parameters are trained alike, and so lie in one flat buffer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from internlm.config.schema import AdamConfig, OptimizerConfig, ParamGroupConfig
from internlm.core.context.parallel_mode import ParallelMode
from internlm.core.parallel.fully_sharded import compute_dtype
from internlm.core.parallel.placement import ParamPlacement, placed_parameters
from internlm.utils.errors import ConfigError, Problem


class Placed(NamedTuple):
    """A parameter of the model, and the how many-eth of it that it is."""

    name: str
    parameter: nn.Parameter
    placement: ParamPlacement
    place: int = 0


@dataclass(frozen=True)
class Kind:
    """What parameters of one flat buffer have in common."""

    dtype: torch.dtype
    rule: str  # see internlm.solver.optimizer.rules
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    #: Over which they are split, and over which their gradients are still partial sums.
    split_over: ParallelMode | None = None
    partial_over: ParallelMode | None = None

    @property
    def needs_matrices(self) -> bool:
        """Whether a rank must own whole parameters."""
        return self.rule == "Muon"


def kind_of(
    name: str, placement: ParamPlacement, dtype: torch.dtype, adam: AdamConfig, optimizer: OptimizerConfig
) -> Kind:
    """How the parameter of that name is trained."""
    group = next((each for each in optimizer.param_groups if re.search(each.pattern, name)), None)
    decays = placement.is_matrix or adam.decay_norm_and_bias
    decay = group.weight_decay if group and group.weight_decay is not None else adam.weight_decay * decays
    return Kind(
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


def by_kind(model: nn.Module, adam: AdamConfig, optimizer: OptimizerConfig) -> dict[Kind, list[Placed]]:
    """The trainable parameters of each kind, in the order of the model."""
    kinds: dict[Kind, list[Placed]] = {}
    for place, (name, parameter, placement) in enumerate(placed_parameters(model)):
        if parameter.requires_grad:
            kind = kind_of(name, placement, compute_dtype(parameter), adam, optimizer)
            kinds.setdefault(kind, []).append(Placed(name, parameter, placement, place))
    return kinds
