"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982): momentum whose matrices are made orthogonal.

``torch.optim.Muon`` would do for matrices that are whole. Here a matrix may be split over ranks: its momentum stays so,
since it is kept element by element, and is gathered for the product alone. And products are computed in the type of
main parameters, rather than in bfloat16, where that is what differs between a split matrix and a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from internlm.core.parallel.collectives import all_gather
from internlm.core.parallel.placement import ParamPlacement
from internlm.solver.optimizer.param_groups import ParamGroup
from internlm.solver.optimizer.update_rules import UpdateRule
from internlm.utils.torch_private import foreach_lerp, foreach_lerp_, foreach_mul_

#: Of the quintic x → a·x + b·x³ + c·x⁵, which pulls singular values towards 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7

#: Factor on the learning rate for a matrix [O, I].
ADJUST: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: [O, I] -> [O, I], singular values 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


class Muon(UpdateRule):
    """Muon over matrices that lie whole in one rank's shard, or are split over the groups of a parallel mode."""

    states = ("momentum",)

    def _update(self, group: ParamGroup, lr: float, beta2: float) -> None:
        o, momentum = self.optimizer, group.split(self._states[group]["momentum"])
        foreach_lerp_(momentum, group.grad_parts, 1 - o.momentum)
        direction = foreach_lerp(group.grad_parts, momentum, o.momentum) if o.nesterov else momentum
        foreach_mul_(group.main_parts, 1 - lr * group.kind.weight_decay)
        for piece in group.pieces():
            placement, number, where = piece.placement, piece.number, slice(piece.lo, piece.hi)
            whole = orthogonal(self._whole(direction[number][where], placement), o.ns_steps)
            own = placement.shard_of(whole.contiguous().view(placement.global_shape)).reshape(-1)
            main = group.main_parts[number][where][: own.numel()]  # without padding
            main.add_(own, alpha=-lr * ADJUST[o.adjust_lr](*placement.matrix_shape))

    def _whole(self, part: Tensor, placement: ParamPlacement) -> Tensor:
        """The matrix of which this rank has ``part``, flat."""
        if placement.shard is None:
            return part.view(placement.matrix_shape)
        whole = part.new_empty(placement.global_shape)
        parts = all_gather(part, self.process_groups.by_split[placement.shard.mode]).view(placement.shard.count, -1)
        for index, each in enumerate(parts):
            there = replace(placement, shard=replace(placement.shard, index=index)).shard_of(whole)
            there.copy_(each[: there.numel()].view_as(there))  # without padding
        return whole.view(placement.matrix_shape)
