"""Initial values of parameters."""

from __future__ import annotations

import torch
from torch import nn

from internlm.core.context.random import derived_seed
from internlm.core.parallel.param_state import placed_parameters


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator seeded by (seed, logical name), so that the layout does not matter.

    Values are drawn in float32 for the global shape (float64 keeps their bits), and each rank keeps its shard.
    """
    for name, parameter, placement in placed_parameters(module):
        generator = torch.Generator().manual_seed(derived_seed(seed, "parameter", name))
        whole = placement.init(torch.empty(placement.global_shape, dtype=torch.float32, device="cpu"), generator)
        shard = placement.shard_of(whole)
        parameter.view(-1)[: shard.numel()].copy_(shard.reshape(-1))
        parameter.view(-1)[shard.numel() :].zero_()  # padding
