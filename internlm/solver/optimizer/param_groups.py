"""Param groups: parameters with the same update settings, and the shard of a group that this rank owns.

Parameters with the same :class:`ParamGroupKey` form a :class:`ParamGroup`. A rank owns a *shard* of a group, and has
main parameters, reduced gradients and optimizer state for its elements only. A shard is a list of flat tensors;
optimizer state is one tensor over the whole shard, and :meth:`ParamGroup.split` splits it into the same sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.config.schema import AdamConfig, OptimizerConfig
from internlm.config.schema.optim import OptimizerName, ParamGroupConfig
from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.param_state import NamedParameter
from internlm.core.parallel.placement import ParamPlacement
from internlm.utils.dtype import wide
from internlm.utils.errors import ConfigError, Problem, UserError

#: Zero group of a rank that holds the whole optimizer state.
ALONE = Group(ParallelMode.ZERO1)


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """Process groups over which an optimizer communicates."""

    zero: Group = ALONE
    """Ranks over which one copy of the optimizer state is sharded."""
    replica: Group = ALONE
    """Ranks that own the same shard."""
    split: tuple[Group, ...] = ()
    """Groups over which parameters are split, or the gradients of whole parameters are partial sums."""
    pipeline: Group = NO_PIPELINE
    """Stages of a pipeline."""
    ends: Group = NO_PIPELINE
    """First and last stage of a pipeline, which may both hold a tied embedding."""

    @property
    def by_split(self) -> Mapping[ParallelMode, Group]:
        """Process groups in `split`, keyed by parallel mode."""
        return {group.mode: group for group in self.split}

    def of_partial(self, mode: ParallelMode) -> Group:
        """Return the group over which gradients with ``partial_over=mode`` are summed."""
        return self.ends if mode is ParallelMode.PIPELINE else self.by_split[mode]


@dataclass(frozen=True, kw_only=True)
class ParamGroupKey:
    """Properties that the parameters of one group have in common."""

    dtype: torch.dtype
    """Compute dtype of the parameters."""
    rule: OptimizerName
    """Name of the update rule."""
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    split_over: ParallelMode | None = None
    """Parallel mode over whose group the parameters are split."""
    partial_over: ParallelMode | None = None
    """Parallel mode over whose group the gradients are still partial sums."""

    @property
    def needs_matrices(self) -> bool:
        """Whether the update rule needs whole parameters in one rank's shard."""
        return self.rule == "Muon"


def build_param_groups(
    parameters: Sequence[NamedParameter], adam: AdamConfig, optimizer: OptimizerConfig
) -> dict[ParamGroupKey, list[NamedParameter]]:
    """Group the trainable ``parameters`` by key, each group in model order."""
    groups: dict[ParamGroupKey, list[NamedParameter]] = {}
    for named in parameters:
        if named.parameter.requires_grad:
            key = param_group_key(named.name, named.placement, named.compute_dtype, adam, optimizer)
            groups.setdefault(key, []).append(named)
    return groups


def param_group_key(
    name: str, placement: ParamPlacement, dtype: torch.dtype, adam: AdamConfig, optimizer: OptimizerConfig
) -> ParamGroupKey:
    """Return the key of one parameter, from the first of ``optimizer.param_groups`` that matches its name."""
    config = next((group for group in optimizer.param_groups if re.search(group.pattern, name)), None)
    # Recipes differ in whether norms and biases decay, so the config has a key for it (adam.decay_norm_and_bias).
    decays = placement.is_matrix or adam.decay_norm_and_bias
    decay = config.weight_decay if config and config.weight_decay is not None else adam.weight_decay * decays
    return ParamGroupKey(
        dtype=dtype,
        rule=_update_rule(name, placement, config, optimizer),
        weight_decay=float(decay),
        lr_scale=float(config.lr_scale) if config else 1.0,
        split_over=placement.shard.mode if placement.shard else None,
        partial_over=placement.partial_over,
    )


def _update_rule(
    name: str, placement: ParamPlacement, config: ParamGroupConfig | None, optimizer: OptimizerConfig
) -> OptimizerName:
    if config and config.type:
        if config.type == "Muon" and not placement.is_matrix:
            message = f"{config.pattern!r} gives {name!r} to Muon, but the parameter is not a matrix"
            raise ConfigError(Problem("optimizer.param_groups", message, "Set type='AdamW' or 'Lion' for this pattern"))
        return config.type
    # Embedding and head do not map between hidden units, so orthogonal updates do not suit them (Jordan et al. 2024).
    return "AdamW" if optimizer.type == "Muon" and not placement.is_hidden else optimizer.type


@dataclass(frozen=True, kw_only=True)
class ShardSlice:
    """Elements of one parameter that lie in one tensor of a group's shard."""

    name: str
    placement: ParamPlacement
    start: int
    """First element within the parameter's flattened local tensor; ``stop`` is one past the last."""
    stop: int
    index: int
    """Index of the tensor in ``main_shards`` and ``grad_shards``; the slice is its elements [lo, hi)."""
    lo: int
    hi: int


class ParamGroup:
    """Parameters with one key, and this rank's shard of them; subclasses allocate the memory."""

    key: ParamGroupKey
    #: Buffer in which gradients are accumulated, including those that other ranks own.
    grads: Tensor
    #: Main parameters of the shard.
    main_shards: list[Tensor]
    #: Gradients of the shard, once they are reduced.
    grad_shards: list[Tensor]

    @property
    def main_dtype(self) -> torch.dtype:
        """Dtype of main parameters, reduced gradients and optimizer state: at least float32."""
        return wide(self.key.dtype)

    @property
    def has_main(self) -> bool:
        """Whether main parameters are a separate copy, because they are wider than model parameters."""
        return self.key.dtype != self.main_dtype

    @property
    def owned(self) -> int:
        """Number of elements of the shard, padding included."""
        return sum(map(len, self.main_shards))

    def new_state(self) -> Tensor:
        """Allocate optimizer state: one zero for each element of the shard."""
        return torch.zeros(self.owned, dtype=self.main_dtype, device=self.main_shards[0].device)

    def split(self, state: Tensor) -> list[Tensor]:
        """Return views of ``state``, one for each tensor of the shard."""
        return list(state.split([*map(len, self.main_shards)]))

    def shard_slices(self) -> Iterator[ShardSlice]:
        """Iterate over the slices of parameters that the shard holds, in its order."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """Iterate over position, name and local gradient (not yet reduced) of each parameter."""
        raise NotImplementedError

    def attach_grads(self) -> None:
        """Accumulate gradients in ``grads`` from now on."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Set the gradients to zero.

        Raises:
            UserError: The parameters were moved to other memory after the group was created.
        """
        # Checking one parameter suffices, because model.to() and .half() move all of them, and saves time in each step.
        name, parameter, memory = self._first_parameter()
        if local_shard(parameter).flat.data_ptr() != memory.data_ptr():
            message = f"{name!r} was moved out of the optimizer's buffer, so updates do not reach it"
            raise UserError(Problem("model", message, "Call model.to() or .half() before creating the optimizer"))
        self.grads.zero_()

    def _first_parameter(self) -> tuple[str, Tensor, Tensor]:
        """Return name and tensor of the first parameter, and the memory that the group assigned to it."""
        raise NotImplementedError

    def copy_main_to_model_params(self) -> None:
        """Round main parameters into this rank's shard of the model parameters; no-op if they share memory."""

    def copy_model_to_main_params(self) -> None:
        """Widen this rank's shard of the model parameters into the main parameters."""
