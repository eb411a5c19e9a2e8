"""Low-rank adapters of linears (LoRA, Hu et al. 2021, arXiv 2106.09685): y = x · Wᵀ + (alpha / r) · (x · Aᵀ) · Bᵀ.

An adapter is two linears of rank r beside the frozen one. They are ordinary parallel layers, so an adapter works in
every layout; of the two, the one that touches the split features of the frozen linear is split in the same way:

=========  ==========================  ==========================
linear     A, [r, I]                   B, [O, r]
=========  ==========================  ==========================
column     whole on every rank         split by its output
row        split by its input          whole on every rank
=========  ==========================  ==========================

Under isp, where a rank has all features of its own tokens, both are whole. What is communicated for an adapter is r
elements per token, where the frozen linear communicates its input or output.

Shapes: T tokens, I input features, O output features (the product of ``out_shape``), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.core.parallel.linear import Before, LinearGroup, ParallelLinear
from internlm.core.parallel.placement import Init, constant, normal
from internlm.core.parallel.sharding import current_sharding


@dataclass(frozen=True)
class Adapter:
    """Rank and scale of the adapter of a linear."""

    rank: int
    scale: float
    """Factor of the adapter's output, alpha / rank."""


class AdaptedLinear(ParallelLinear):
    """Parallel linear with a low-rank adapter, whose output is zero at first.

    Args:
        adapter: Rank and scale of the adapter.
        in_features: Number of input features, I.
        out_shape: Shape of the output features of a token.
        init: Distribution of the initial values of the weight.
        bias: Whether to add a bias.
        role: Role of the layer, ``column`` or ``row``.
        split_axis: Axis of ``out_shape`` along which a column linear is split.
    """

    def __init__(
        self,
        adapter: Adapter,
        in_features: int,
        out_shape: int | tuple[int, ...],
        init: Init,
        bias: bool = False,
        role: str = "column",
        split_axis: int = 0,
    ) -> None:
        super().__init__(in_features, out_shape, init, bias, role, split_axis)
        self.scale = adapter.scale
        is_isp = current_sharding().mode == "isp"
        down, up = ("replicated", role) if role == "column" else (role, "replicated")
        roles = ("replicated", "replicated") if is_isp else (down, up)
        # The variance of x · Aᵀ is that of x, whatever the width; B starts at zero, so that training starts from W.
        self.lora_a = ParallelLinear(in_features, adapter.rank, normal(1 / math.sqrt(in_features)), role=roles[0])
        self.lora_b = ParallelLinear(adapter.rank, out_shape, constant(0.0), role=roles[1], split_axis=split_axis)

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """Apply the linear and its adapter: [T, I] → [T, *out_shape], or this rank's shard of the output."""
        low = self.lora_a(x, before)  # [T, r]
        return torch.add(super().forward(x, before), self.lora_b(low), alpha=self.scale)


class AdaptedGroup(LinearGroup):
    """Group of linears with one input, each of which has an adapter of its own.

    Args:
        linears: The linears, in the order of their outputs.
        axis: Axis of ``out_shape`` along which the outputs are joined.
    """

    def __init__(self, linears: Sequence[AdaptedLinear], axis: int) -> None:
        super().__init__(linears, axis)
        self.adapted = tuple(linears)
        self.downs = LinearGroup([linear.lora_a for linear in linears], axis=0)

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """Apply the linears and their adapters: [T, I] → [T, *joint shape], or this rank's shard of the output."""
        lows = self.downs(x, before).chunk(len(self.adapted), 1)  # [T, r] of each
        ups = [linear.lora_b(low.contiguous()) for linear, low in zip(self.adapted, lows, strict=True)]
        return torch.add(super().forward(x, before), torch.cat(ups, self.axis + 1), alpha=self.adapted[0].scale)


def group_of(linears: Sequence[ParallelLinear], axis: int) -> LinearGroup:
    """Return the group of ``linears``, of which all have an adapter or none has."""
    adapted = [linear for linear in linears if isinstance(linear, AdaptedLinear)]
    return AdaptedGroup(adapted, axis) if adapted else LinearGroup(linears, axis)


def is_adapter(name: str) -> bool:
    """Return whether the parameter of this logical name belongs to an adapter."""
    return ".lora_a." in name or ".lora_b." in name


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Freeze every parameter of ``model`` that belongs to no adapter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the weight of a linear with its adapter added: [*out_shape, I], [r, I], [*out_shape, r] → [*out_shape, I].

    The sum is computed in at least float32 and rounded once.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = b.to(wide).flatten(0, -2) @ a.to(wide)
    return (weight.to(wide) + scale * update.view(weight.shape)).to(weight.dtype)
