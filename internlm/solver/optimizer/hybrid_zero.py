"""AdamW with its state sharded over part of the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054, with a choice
of group).

One step, in phases:

1. **reduce**: gradients are summed into shards inside the zero group, then across the replicas of each shard, then over
   ranks that have parts of the sum besides.
2. **measure**: the global norm, of every logical element once, over the stages of the pipeline too.
3. **decide**: a norm that is inf or nan skips the step, on every rank alike.
4. **update**: one fused AdamW over this rank's flat shard, which also applies the clipping.
5. **gather**: the new parameters, inside the zero group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig
from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.parallel_mode import ParallelMode
from internlm.core.parallel.collectives import Pending, all_gather, all_reduce, begin_reduce_scatter
from internlm.core.parallel.placement import ParamPlacement, placed_parameters
from internlm.solver.optimizer.flat_group import ALIGNMENT, FlatGroup
from internlm.utils.errors import Problem, UserError

Placed = tuple[str, nn.Parameter, ParamPlacement]


@dataclass(frozen=True)
class OptimizerStep:
    """What a step did."""

    updated: bool
    grad_norm: float


class HybridZeroOptimizer:
    """Owns the flat buffers of a model's parameters and gradients.

    ``zero_group`` shares one copy of the state; ``replica_group`` joins the ranks that hold the same shard of it;
    ``split_groups`` are those over which parameters are split, or gradients of whole ones still partial sums;
    ``pipeline_group`` joins the stages, ``ends_group`` the first and the last, which may share an embedding. The
    gradient buffer must hold this rank's part of the sum over all data-parallel ranks: the loss is already divided by
    the valid tokens of the global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        adam: AdamConfig,
        clip_grad_norm: float,
        zero_group: Group,
        replica_group: Group,
        split_groups: Sequence[Group] = (),
        pipeline_group: Group = NO_PIPELINE,
        ends_group: Group = NO_PIPELINE,
    ) -> None:
        self.zero_group, self.replica_group, self.pipeline_group = zero_group, replica_group, pipeline_group
        self.split_groups = {group.mode: group for group in split_groups}
        self.partial_groups = {**self.split_groups, ParallelMode.PIPELINE: ends_group}
        self.clip_grad_norm = clip_grad_norm
        self.groups = [
            FlatGroup(members, decay, zero_group.rank, zero_group.size) for members, decay in _kinds(model, adam)
        ]
        if not self.groups:
            what = f"nothing is to be trained (stage {pipeline_group.rank} of {pipeline_group.size})"
            raise UserError(Problem("model", what, "Leave a parameter of every stage with requires_grad = True"))
        self.adam = torch.optim.AdamW(
            [{"params": [group.main], "weight_decay": group.weight_decay} for group in self.groups],
            lr=adam.lr,
            betas=(adam.adam_beta1, adam.adam_beta2),
            eps=adam.adam_eps,
            fused=True,
        )
        for group in self.groups:
            self._make_state(group.main)
        self._reducing: list[Pending] = []

    def _make_state(self, main: nn.Parameter) -> None:
        """Adam's state from the start, so that a checkpoint can be loaded before the first step."""
        self.adam.state[main] = {
            "step": torch.zeros((), dtype=torch.float32, device=main.device),
            "exp_avg": torch.zeros_like(main),
            "exp_avg_sq": torch.zeros_like(main),
        }

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._reduced()
        for group in self.groups:
            group.grads.zero_()

    def begin_reduction(self) -> None:
        """Begin to sum the gradients of the step, which are complete. Without this, :meth:`step` does it."""
        assert not self._reducing, "gradients are being reduced already"
        self._reducing = [begin_reduce_scatter(group.grads, self.zero_group, group.grad_shard) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float, beta2: float) -> OptimizerStep:
        """Reduce, clip, update and gather; see the top of the file. Parameters and state stay as they are where
        ``updated`` is False."""
        if not self._reducing:
            self.begin_reduction()
        self._reduced()
        for group in self.groups:
            self._sum_up(group)
        norm = self._global_norm()
        if not math.isfinite(norm):
            return OptimizerStep(updated=False, grad_norm=norm)
        self._update(lr, beta2, norm)
        for group in self.groups:
            group.main_to_values()
            all_gather(group.value_shard, self.zero_group, group.values)
        return OptimizerStep(updated=True, grad_norm=norm)

    def _reduced(self) -> None:
        for pending in self._reducing:
            pending.wait()
        self._reducing = []

    def _sum_up(self, group: FlatGroup) -> None:
        """Beyond the zero group."""
        all_reduce(group.grad_shard, self.replica_group)
        if group.partial_over is not None:
            all_reduce(group.grad_shard, self.partial_groups[group.partial_over])

    def _global_norm(self) -> float:
        """L2 norm over every logical element, once, hardly dependent on the layout: parameters that are split have
        other elements on each rank, those that are not the same."""
        modes = [None, *self.split_groups]
        squares = torch.zeros(len(modes), dtype=torch.float64, device=self.groups[0].main.device)
        for group in self.groups:
            if not self._is_copy(group):
                squares[modes.index(group.split_over)] += _accurate_norm(group.grad_shard) ** 2
        all_reduce(squares, self.zero_group)
        for mode, square in zip(modes, squares, strict=True):
            if mode is not None:
                all_reduce(square, self.split_groups[mode])
        return math.sqrt(all_reduce(squares.sum(), self.pipeline_group).item())

    def _is_copy(self, group: FlatGroup) -> bool:
        """Whether another stage counts what is in ``group``."""
        return group.partial_over is ParallelMode.PIPELINE and self.partial_groups[ParallelMode.PIPELINE].rank > 0

    def _update(self, lr: float, beta2: float, norm: float) -> None:
        for options in self.adam.param_groups:
            options["lr"], options["betas"] = lr, (options["betas"][0], beta2)
        self._clip(max(1.0, (norm + 1e-6) / self.clip_grad_norm) if self.clip_grad_norm > 0 else 1.0)
        self.adam.step()

    def _clip(self, divisor: float) -> None:
        """Have gradients divided by ``divisor``. The fused kernel does it as it reads them, but knows the divisor in
        float32 only, which is too coarse for float64."""
        double = any(group.grads.dtype == torch.float64 for group in self.groups)
        if double:
            for group in self.groups:
                group.grad_shard.div_(divisor)
        scale = None if double else torch.tensor(divisor, device=self.groups[0].main.device)
        self.adam.grad_scale = scale  # type: ignore[attr-defined]

    def state_of(self, group: FlatGroup) -> dict[str, Tensor]:
        """What AdamW keeps for this rank's shard of ``group``: flat tensors by name (``step`` is a scalar)."""
        return self.adam.state[group.main]


def _accurate_norm(flat: Tensor) -> Tensor:
    """L2 norm in float64. Row by row first: over ten million elements a float32 sum is off by 1e-4 on CPU, and a
    float64 one takes many times as long."""
    rows = torch.linalg.vector_norm(flat.view(-1, ALIGNMENT), dim=1)
    return torch.linalg.vector_norm(rows, dtype=torch.float64)


def _kinds(model: nn.Module, adam: AdamConfig) -> list[tuple[Sequence[Placed], float]]:
    """Trainable parameters by (type, weight decay, split over, partial over), in the order of the model."""
    kinds: dict[tuple[object, ...], tuple[float, list[Placed]]] = {}
    for name, parameter, placement in placed_parameters(model):
        if parameter.requires_grad:
            decays = placement.is_matrix or adam.decay_norm_and_bias
            decay = adam.weight_decay if decays else 0.0
            split = placement.shard and placement.shard.mode
            kind = parameter.dtype, decay, split, placement.partial_over
            kinds.setdefault(kind, (decay, []))[1].append((name, parameter, placement))
    return [(members, decay) for decay, members in kinds.values()]
