"""Param groups: parameters with the same update settings, and this rank's shard of them.

Parameters with the same :class:`ParamGroupKey` form a :class:`ParamGroup`. A rank owns a *shard* of a group, and has
main parameters, reduced gradients and optimizer state for the elements of its shard only. A shard is a list of flat
tensors. Each optimizer state is one tensor over the whole shard, and :meth:`ParamGroup.split` returns views of it with
the sizes of the shard's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm.config.schema import AdamConfig, OptimizerConfig
from internlm.config.schema.optim import OptimizerName, ParamGroupConfig
from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.param_state import NamedParameter
from internlm.core.parallel.placement import ParamPlacement
from internlm.utils.compat import DictAccess
from internlm.utils.dtype import wide
from internlm.utils.errors import ConfigError, Problem, UserError
from internlm.utils.same_memory import same_memory

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
    """Groups over which parameters are split, or over which partial gradients of whole parameters are summed."""
    pipeline: Group = NO_PIPELINE
    """Ranks that hold the stages of one pipeline."""
    ends: Group = NO_PIPELINE
    """Ranks of the first and the last stage of a pipeline, which may both hold a tied embedding."""

    @property
    def by_split(self) -> Mapping[ParallelMode, Group]:
        """Process groups over which parameters are split or partial gradients are summed, by parallel mode."""
        return {group.mode: group for group in self.split}

    def of_partial(self, mode: ParallelMode) -> Group:
        """Return the group over which gradients with ``partial_over=mode`` are summed."""
        return self.ends if mode is ParallelMode.PIPELINE else self.by_split[mode]


@dataclass(frozen=True, kw_only=True)
class ParamGroupKey:
    """Key of a param group: the properties that all of its parameters share."""

    dtype: torch.dtype
    """Compute dtype of the parameters."""
    rule: OptimizerName
    """Name of the update rule."""
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    split_over: ParallelMode | None = None
    """Parallel mode over whose group the parameters are split; None if they are whole."""
    partial_over: ParallelMode | None = None
    """Parallel mode over whose group partial gradients must be summed; None if gradients are not partial."""

    @property
    def needs_matrices(self) -> bool:
        """Whether the update rule needs each parameter whole in one rank's shard."""
        return self.rule == "Muon"


def build_param_groups(
    parameters: Sequence[NamedParameter], adam: AdamConfig, optimizer: OptimizerConfig
) -> dict[ParamGroupKey, list[NamedParameter]]:
    """Group the trainable ``parameters`` by key, each group in model order.

    Raises:
        ConfigError: A pattern of ``optimizer.param_groups`` assigns Muon to a parameter that is not a matrix.
    """
    groups: dict[ParamGroupKey, list[NamedParameter]] = {}
    for named in parameters:
        if named.parameter.requires_grad:
            key = param_group_key(named.name, named.placement, named.compute_dtype, adam, optimizer)
            groups.setdefault(key, []).append(named)
    return groups


def param_group_key(
    name: str, placement: ParamPlacement, dtype: torch.dtype, adam: AdamConfig, optimizer: OptimizerConfig
) -> ParamGroupKey:
    """Return the param-group key of one parameter.

    The first entry of ``optimizer.param_groups`` whose pattern matches the name overrides the settings of ``adam`` and
    ``optimizer``.

    Raises:
        ConfigError: The entry assigns Muon to a parameter that is not a matrix.
    """
    config = next((group for group in optimizer.param_groups if re.search(group.pattern, name)), None)
    # Published recipes differ in whether norms and biases have weight decay, hence adam.decay_norm_and_bias.
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
            shape = list(placement.global_shape)
            message = f"pattern {config.pattern!r} assigns Muon to {name!r}: expected a matrix, got shape {shape}"
            raise ConfigError(Problem("optimizer.param_groups", message, "Set type='AdamW' or 'Lion' for this pattern"))
        return config.type
    # Orthogonalised updates do not suit embedding and head, which do not map hidden units to hidden units (Jordan et
    # al. 2024).
    return "AdamW" if optimizer.type == "Muon" and not placement.is_hidden else optimizer.type


@dataclass(frozen=True, kw_only=True)
class ShardSlice:
    """Slice of a flattened parameter that lies in one tensor of a group's shard."""

    name: str
    placement: ParamPlacement
    start: int
    """Index of the slice's first element in the parameter's flattened local tensor; ``stop`` is one past its last."""
    stop: int
    index: int
    """Index of the tensor in ``main_shards`` and ``grad_shards``; the slice is elements [lo, hi) of this tensor."""
    lo: int
    hi: int


@dataclass(frozen=True, kw_only=True)
class ParamGroupView(DictAccess):
    """Settings of a param group, readable as an entry of ``param_groups`` of torch's optimizers."""

    params: Sequence[Tensor]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def refuse(self, name: str, *value: Any) -> UserError:
        """Return the error for changing the setting ``name``."""
        todo = "Set it in the config, or pass a function of the step as lr_scheduler to initialize_trainer"
        return UserError(Problem(f"optimizer.param_groups: {name}", "cannot be changed by a script", todo))


class ParamGroup:
    """Param group: parameters with the same key, and this rank's shard of them; subclasses allocate the memory."""

    key: ParamGroupKey
    #: Flat buffer in which gradients are accumulated.
    grads: Tensor
    #: Main parameters of this rank's shard.
    main_shards: list[Tensor]
    #: Gradients of this rank's shard, once they are reduced.
    grad_shards: list[Tensor]

    @property
    def main_dtype(self) -> torch.dtype:
        """Dtype of main parameters, reduced gradients and optimizer state: at least float32."""
        return wide(self.key.dtype)

    @property
    def has_main(self) -> bool:
        """Whether main parameters are a separate copy, because the compute dtype is narrower than float32."""
        return self.key.dtype != self.main_dtype

    @property
    def owned(self) -> int:
        """Number of elements of this rank's shard, padding included."""
        return sum(map(len, self.main_shards))

    def new_state(self) -> Tensor:
        """Allocate a tensor of zeros in ``main_dtype``, with one element for each element of this rank's shard."""
        return torch.zeros(self.owned, dtype=self.main_dtype, device=self.main_shards[0].device)

    def split(self, state: Tensor) -> list[Tensor]:
        """Split ``state``, a tensor of ``owned`` elements, into views, one for each tensor of this rank's shard."""
        return list(state.split([*map(len, self.main_shards)]))

    def shard_slices(self) -> Iterator[ShardSlice]:
        """Iterate over the parameter slices in this rank's shard, in the order of the shard."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (model position, name, local gradient) for each parameter, before gradients are reduced over ranks."""
        raise NotImplementedError

    def attach_grads(self) -> None:
        """Attach ``grads`` to the parameters, as the memory in which backward passes accumulate gradients."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Begin new gradients, and check that the parameters are still in the group's memory.

        Raises:
            UserError: The parameters were moved to other memory after the group was created.
        """
        # Checking one parameter saves time in each step, and suffices, because model.to() and .half() move all of them.
        name, parameter, memory = self._first_parameter()
        if not same_memory(local_shard(parameter).flat, memory):
            message = f"{name!r} was moved out of the optimizer's buffer, so updates do not reach it"
            raise UserError(Problem("model", message, "Call model.to() or .half() before creating the optimizer"))
        self._begin_grads()

    def _begin_grads(self) -> None:
        """Forget the gradients of the last step."""
        self.grads.zero_()

    def complete_grads(self) -> None:
        """Set the gradients of all parameters to zero that got none in this step."""

    def _first_parameter(self) -> tuple[str, Tensor, Tensor]:
        """Return the name and tensor of the first parameter, and the memory that the group assigned to it."""
        raise NotImplementedError

    def copy_main_to_model_params(self) -> None:
        """Copy main parameters, rounded, to this rank's shard of the model parameters; no-op if they share memory."""

    def copy_model_to_main_params(self) -> None:
        """Copy this rank's shard of the model parameters to the main parameters; no-op if they share memory."""
