"""How far a run on several ranks may be from that on one process, by type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Largest relative differences; of tensors in the L2 norm. What several ranks hold must be equal bit by bit."""

    first_loss: float
    first_norm: float
    """Global gradient norm."""
    losses: float
    """Of the steps after the first."""
    norms: float
    gradients: float
    """Each, of the first step."""
    parameters: float
    """Each, after the last step."""
    modules: float
    """From which on a module's output is said to differ; no part of the verdict, for whatever matters of it shows in
    loss and gradients."""


#: In half precision the limits are those of layouts that round alike (data parallelism, ZeRO).
LIMITS = {
    "torch.float64": Limits(1e-12, 1e-12, 1e-10, 1e-10, 1e-11, 1e-10, 1e-11),
    "torch.float32": Limits(1e-6, 1e-6, 1e-5, 1e-4, 1e-5, 1e-4, 1e-5),
    "torch.tf32": Limits(1e-6, 1e-6, 1e-5, 1e-4, 1e-5, 1e-4, 1e-5),  # on CPU the same as float32
    "torch.bfloat16": Limits(1e-6, 1e-6, 1e-3, 1e-2, 1e-5, 5e-2, 1e-2),
    "torch.float16": Limits(1e-6, 1e-6, 1e-3, 1e-2, 1e-5, 5e-2, 1e-2),
}
