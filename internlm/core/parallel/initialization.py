"""Initial values: a parameter's values depend on (seed, logical name, logical index) alone, so on no layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.core.context.random import derived_seed
from internlm.core.parallel.fully_sharded import adopt_new_shards, local_shard
from internlm.core.parallel.param_state import compute_dtype, placed_parameters, placement_of
from internlm.core.parallel.placement import Init


def materialize(model: nn.Module, seed: int, device: torch.device) -> list[nn.Parameter]:
    """Give parameters that are on the meta device memory on ``device`` and their initial values; return those.

    Parameters keep their identity, so ties, placements and communicators that refer to them stay valid.
    """
    deferred = [(name, parameter) for name, parameter, _ in placed_parameters(model) if parameter.is_meta]
    for _, parameter in deferred:
        new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        new.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, new)
    adopt_new_shards(model)  # before they are written to: fully_shard may move them
    for name, parameter in deferred:
        draw(parameter, name, seed)
    return [parameter for _, parameter in deferred]


def initialize_parameters(module: nn.Module, seed: int) -> None:
    """Draw the initial values of every parameter of ``module`` that is placed with a distribution."""
    for name, parameter, _ in placed_parameters(module):
        draw(parameter, name, seed)


@torch.no_grad()
def draw(parameter: nn.Parameter, name: str, seed: int) -> None:
    """Draw what this rank holds of ``parameter``, in float32, and round it to the parameter's type; padding is 0."""
    placement = placement_of(parameter, name)
    if placement.init is None:
        return
    generator = torch.Generator().manual_seed(derived_seed(seed, "parameter", name))
    whole = _fill(torch.empty(placement.global_shape, dtype=torch.float32, device="cpu"), placement.init, generator)
    part = placement.shard_of(whole).reshape(-1)
    flat, start = local_shard(parameter)
    here = part[start : start + flat.numel()].to(compute_dtype(parameter))
    flat[: here.numel()].copy_(here)
    flat[here.numel() :].zero_()


def _fill(tensor: Tensor, init: Init, generator: torch.Generator) -> Tensor:
    return tensor.normal_(init.mean, init.std, generator=generator) if init.std else tensor.fill_(init.mean)
