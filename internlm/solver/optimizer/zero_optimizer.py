"""The optimizer, its state sharded over part of the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054, with a choice
of group).

One step, in phases:

1. **reduce**: gradients are summed into shards inside the zero group, then across the replicas of each shard, then over
   ranks that have parts of the sum besides.
2. **measure**: the global norm, of every logical element once, over the stages of the pipeline too.
3. **decide**: a norm that is inf or nan skips the step, on every rank alike.
4. **update**: the rule of each group over this rank's flat shard, of gradients that are clipped.
5. **gather**: the new parameters, inside the zero group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, HybridZeroConfig, OptimizerConfig
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.collectives import all_reduce
from internlm.core.parallel.fully_sharded import is_fully_sharded
from internlm.solver.optimizer.flat_buffers import FlatParamGroup, bucket_size
from internlm.solver.optimizer.fully_sharded_group import FullyShardedGroup, ReplicaReducer
from internlm.solver.optimizer.grad_reduce import Reducer
from internlm.solver.optimizer.loss_scale import LossScale, first_nonfinite_gradient
from internlm.solver.optimizer.muon import Muon
from internlm.solver.optimizer.param_gather import Gatherer
from internlm.solver.optimizer.param_groups import ParamGroup, ProcessGroups, build_param_groups
from internlm.solver.optimizer.update_rules import AdamW, Lion, UpdateRule
from internlm.utils.errors import Problem, UserError

#: By the name that configs have for each.
UPDATE_RULES: dict[str, type[UpdateRule]] = {"AdamW": AdamW, "Lion": Lion, "Muon": Muon}


@dataclass(frozen=True)
class OptimizerStep:
    """What a step did."""

    updated: bool
    grad_norm: float
    """Before clipping; inf or nan where nothing was updated."""
    loss_scale: float = 1.0
    """By which the loss was multiplied."""
    skipped_in_a_row: int = 0
    """Steps that were skipped, up to this one."""
    nonfinite_gradient: str | None = None
    """Where this rank's gradient was inf or nan, if it was, and one more skipped step was one too many."""


class HybridZeroOptimizer:
    """Owns the flat buffers of a model's parameters and gradients, and updates them by the rules of ``optimizer``. Of a
    model that is fully sharded it takes what is held here as it is, and phases 1 and 5 inside the zero group are done
    already, or done later, by the model.

    The gradient buffers must hold this rank's part of the sum over all data-parallel ranks: the loss is already divided
    by the valid tokens of the global batch, and multiplied by ``loss_scale.scale``. Gradients are reduced in
    ``reduce_dtype``; without it, in the type in which they are accumulated.
    """

    def __init__(
        self,
        model: nn.Module,
        adam: AdamConfig,
        config: HybridZeroConfig | None = None,
        process_groups: ProcessGroups | None = None,
        *,
        optimizer: OptimizerConfig | None = None,
        loss_scale: LossScale | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.process_groups = config or HybridZeroConfig(), process_groups or ProcessGroups()
        optimizer = optimizer or OptimizerConfig()
        self.loss_scale = loss_scale or LossScale()
        flats, shards = self._groups_of(model, adam, optimizer)
        self.groups: list[ParamGroup] = [*flats, *shards]
        self.rules = [
            rule([group for group in self.groups if group.kind.rule == name], adam, optimizer, self.process_groups)
            for name, rule in UPDATE_RULES.items()
            if any(group.kind.rule == name for group in self.groups)
        ]
        self.updates = 0
        self.skipped_in_a_row = 0
        self._reducer = (
            ReplicaReducer(shards, self.process_groups, reduce_dtype)
            if shards
            else Reducer(flats, self.process_groups, reduce_dtype, self.config.overlap_sync_grad)
        )
        self._gatherer = Gatherer(model, flats, self.process_groups.zero, self.config.overlap_sync_param)

    def _groups_of(
        self, model: nn.Module, adam: AdamConfig, optimizer: OptimizerConfig
    ) -> tuple[list[FlatParamGroup], list[FullyShardedGroup]]:
        """The groups of ``model``: flat buffers, or what is shared already."""
        kinds = build_param_groups(model, adam, optimizer)
        if not kinds:
            stages = self.process_groups.pipeline
            what = f"nothing is to be trained (stage {stages.rank} of {stages.size})"
            raise UserError(Problem("model", what, "Leave a parameter of every stage with requires_grad = True"))
        if is_fully_sharded(model):
            return [], [FullyShardedGroup(kind, members) for kind, members in kinds.items()]
        flats = [
            FlatParamGroup(
                kind,
                members,
                self.process_groups.zero.rank,
                self.process_groups.zero.size,
                bucket_size=bucket_size(self.config),
                split_evenly=self.config.use_split_tensor_optim,
                wide_grads=self.config.fp32_grad_accum,
            )
            for kind, members in kinds.items()
        ]
        return flats, []

    # -- a step -------------------------------------------------------------------------------------------------------
    def begin_step(self, micro_batches: int | None = None) -> None:
        """Forget the gradients. Those of ``micro_batches`` will follow; a caller who doesn't say how many has them
        reduced when all are there."""
        self._reducer.begin_step(None if self._is_last_chance else micro_batches)
        for group in self.groups:
            group.begin_step()

    @property
    def _is_last_chance(self) -> bool:
        """Whether the run is given up if this step is skipped. Then gradients are looked at before they are reduced."""
        return self.skipped_in_a_row + 1 >= self.config.max_skipped_steps

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.begin_step()

    def begin_reduction(self) -> None:
        """Gradients are complete: begin to reduce those that are not on their way (``overlap_sync_grad``). Without
        this, :meth:`step` does it."""
        if self.config.overlap_sync_grad and not self._is_last_chance:
            self._reducer.begin()

    @torch.no_grad()
    def step(self, lr: float, beta2: float) -> OptimizerStep:
        """Reduce, measure, decide, update and gather; see the top of the file. Parameters and state stay as they are
        where ``updated`` is False."""
        self._gatherer.finish()
        suspect = first_nonfinite_gradient(self.groups) if self._is_last_chance else None
        self._reducer.reduce()
        scale = self.loss_scale.scale
        norm = self._global_norm() / scale
        finite = math.isfinite(norm)
        if finite:
            self._update(lr, beta2, norm, scale)
            self._gatherer.begin()
        self.loss_scale.update(overflow=not finite)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return OptimizerStep(finite, norm, scale, self.skipped_in_a_row, suspect)

    def _update(self, lr: float, beta2: float, norm: float, scale: float) -> None:
        clip = self.config.clip_grad_norm
        divisor = scale * (max(1.0, (norm + 1e-6) / clip) if clip > 0 else 1.0)
        for rule in self.rules:
            rule.update(lr, beta2, divisor)
        for group in self.groups:
            group.copy_main_to_params()
        self.updates += 1

    def _global_norm(self) -> float:
        """L2 norm over every logical element, once, hardly dependent on the layout: parameters that are split have
        other elements on each rank, those that are not the same."""
        modes = [None, *self.process_groups.by_split]
        squares = torch.zeros(len(modes), dtype=torch.float64, device=self.groups[0].grads.device)
        for group in self.groups:
            if not self._is_copy(group):
                squares[modes.index(group.kind.split_over)] += sum_of_squares(group.grad_parts)
        all_reduce(squares, self.process_groups.zero)
        for mode, square in zip(modes, squares, strict=True):
            if mode is not None:  # nan in a copy that is not split, if one rank has it, is to be seen by all
                all_reduce(square.add_(squares[0] * 0), self.process_groups.by_split[mode])
        return math.sqrt(all_reduce(squares.sum(), self.process_groups.pipeline).item())

    def _is_copy(self, group: ParamGroup) -> bool:
        """Whether another stage counts what is in ``group``."""
        return group.kind.partial_over is ParallelMode.PIPELINE and self.process_groups.ends.rank > 0

    def gather_parameters(self) -> None:
        """Have all parameters up to date, for whoever reads them without a forward pass (``overlap_sync_param``)."""
        self._gatherer.finish()

    def copy_model_to_main_params(self) -> None:
        """Make main parameters of the model's, after somebody set these: in half precision they would be overwritten by
        the next update without this. Raises :class:`UserError` where gathers that are still on their way
        (``overlap_sync_param``) may have overwritten them: :meth:`gather_parameters` must come first."""
        self._gatherer.demand_all("optimizer.adopt_parameters()")
        for group in self.groups:
            group.copy_params_to_main()

    def copy_main_to_model_params(self) -> None:
        """Make the model's parameters of main parameters that were loaded."""
        for group in self.groups:
            group.copy_main_to_params()
        self._gatherer.gather_all()

    # -- state --------------------------------------------------------------------------------------------------------
    def state_of(self, group: ParamGroup) -> Mapping[str, Tensor]:
        """What is kept for this rank's shard of ``group``: tensors over the shard, by name."""
        return next(rule.state_of(group) for rule in self.rules if group in rule.groups)

    def state_dict(self) -> dict[str, Any]:
        """What is no tensor."""
        counts = {"updates": self.updates, "skipped_in_a_row": self.skipped_in_a_row}
        return {**counts, "loss_scale": self.loss_scale.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.updates, self.skipped_in_a_row = state["updates"], state["skipped_in_a_row"]
        self.loss_scale.load_state_dict(state["loss_scale"])
        for rule in self.rules:
            rule.set_updates(self.updates)


def sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """In float64; row by row first: over ten million elements a float32 sum is off by 1e-4 on CPU, and a float64 one
    takes many times as long."""
    rows = [torch.linalg.vector_norm(part.view(-1, _row_of(part.numel())), dim=1) for part in parts if part.numel()]
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in rows]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def _row_of(numel: int) -> int:
    """Elements of a row: a power of two that divides all, at most 256."""
    return min(numel & -numel, 256)
