"""Muon: SGD with momentum and orthogonalised updates (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

``torch.optim.Muon`` accepts whole matrices only. Here a matrix may be split over ranks. Momentum is updated element by
element, so it stays split; updates are gathered only to be orthogonalised. By default, the matmuls use the dtype of the
main parameters, because rounding to bfloat16 amplifies the small differences between the gradients of two layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from internlm.core.parallel.collectives import all_gather
from internlm.core.parallel.placement import ParamPlacement
from internlm.solver.optimizer.param_groups import ParamGroup
from internlm.solver.optimizer.update_rules import UpdateRule, replace_unless
from internlm.utils.dtype import torch_dtype
from internlm.utils.torch_private import foreach_lerp, foreach_mul_

#: Coefficients of the quintic x → a·x + b·x³ + c·x⁵, which pulls singular values towards 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7

#: Factor on the learning rate for a matrix [O, I], by ``optimizer.adjust_lr``.
ADJUST: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # arXiv 2502.16982, eq. 4
}


def orthogonal(matrix: Tensor, steps: int, dtype: str | None = None) -> Tensor:
    """Approximate the semi-orthogonal matrix nearest to ``matrix`` by Newton-Schulz iterations: [O, I] → [O, I].

    The rows or columns of the result are nearly orthonormal: its singular values are between about 0.7 and 1.2.

    Args:
        matrix: Matrix, [O, I].
        steps: Number of iterations.
        dtype: Config name of the dtype of the matmuls. None: that of ``matrix``.
    """
    a, b, c = COEFFICIENTS
    # Iterate on the transpose of a tall matrix: its Gram matrix is the smaller one.
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    # The iteration converges for singular values up to 1, and none exceeds the Frobenius norm.
    x = (x / x.norm().clamp(min=EPSILON)).to(matrix.dtype if dtype is None else torch_dtype(dtype))
    with _tf32_matmuls() if dtype == "torch.tf32" else nullcontext():
        for _ in range(steps):
            gram = x @ x.t()
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.t() if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


@contextmanager
def _tf32_matmuls() -> Iterator[None]:
    """Allow TF32 in float32 matmuls within the ``with`` block."""
    outer = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(outer)


class Muon(UpdateRule):
    """Muon update rule for matrices that are whole in one rank's shard, or split over the group of a parallel mode."""

    states = ("momentum",)

    def _update(self, group: ParamGroup, lr: float, beta2: float, skip: Tensor) -> None:
        o, momenta = self.optimizer, group.split(self._states[group]["momentum"])
        for momentum, grad in zip(momenta, group.grad_shards, strict=True):
            replace_unless(skip, momentum, torch.lerp(momentum, grad, 1 - o.momentum))
        direction = foreach_lerp(group.grad_shards, momenta, o.momentum) if o.nesterov else momenta
        # Decay by 1 in a skipped step.
        foreach_mul_(group.main_shards, (1 - lr * group.key.weight_decay * (~skip).double()))
        for matrix in group.shard_slices():
            placement, where = matrix.placement, slice(matrix.lo, matrix.hi)
            whole = orthogonal(self._gather_matrix(direction[matrix.index][where], placement), o.ns_steps, o.ns_dtype)
            own = placement.shard_of(whole.contiguous().view(placement.global_shape)).reshape(-1)
            main = group.main_shards[matrix.index][where][: own.numel()]  # without padding
            rate = lr * ADJUST[o.adjust_lr](*placement.matrix_shape)
            replace_unless(skip, main, torch.add(main, own, alpha=-rate))

    def _gather_matrix(self, shard: Tensor, placement: ParamPlacement) -> Tensor:
        """Gather the whole matrix [O, I] from this rank's flat ``shard`` and those of its peers."""
        if placement.shard is None:
            return shard.view(placement.matrix_shape)
        whole = shard.new_empty(placement.global_shape)
        shards = all_gather(shard, self.process_groups.by_split[placement.shard.mode]).view(placement.shard.count, -1)
        for index, other in enumerate(shards):
            target = replace(placement, shard=replace(placement.shard, index=index)).shard_of(whole)
            target.copy_(other[: target.numel()].view_as(target))  # without padding
        return whole.view(placement.matrix_shape)
