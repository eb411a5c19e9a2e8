"""Which gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from internlm.solver.optimizer.parameter_group import ParameterGroup


def bad_gradient(groups: Sequence[ParameterGroup]) -> str | None:
    """The first parameter, in the order of the model, whose gradient on this rank is inf or nan somewhere."""
    suspects = [group for group in groups if not _finite(group.grads)]
    bad = [(place, name) for group in suspects for place, name, grad in group.gradients() if not _finite(grad)]
    return min(bad)[1] if bad else None


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
