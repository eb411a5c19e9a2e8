"""Flat buffers: the parameters of one kind side by side, their gradients likewise, and this rank's shard of both.

Layout of a group, for zero size 2 (``|`` parts the shards, ``·`` is padding)::

    values   [ w0 w0 w0 w0 w1 w1 | w1 w1 w2 ·  ·  ·  ]     the parameters are views of it
    grads    [ the same              |               ]     each ``main_grad`` is a view of it
    main     values' shard where the types agree, else a wider copy of it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from internlm.core.parallel.main_grad import attach_main_grad
from internlm.core.parallel.placement import ParamPlacement

ALIGNMENT = 64  # elements; a shard starts on a cache line whatever its type


@dataclass(frozen=True)
class Member:
    """One parameter of a group, and where it lies in the flat buffers."""

    name: str
    parameter: nn.Parameter
    placement: ParamPlacement
    start: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.parameter.numel()


@dataclass(frozen=True)
class Piece:
    """The part of one parameter's flattened local tensor that lies in a shard: elements [start, stop), and [lo, hi)
    of the shard."""

    member: Member
    start: int
    stop: int
    lo: int
    hi: int


def lay_out(parameters: Sequence[tuple[str, nn.Parameter, ParamPlacement]]) -> list[Member]:
    """Members one after another, without gaps."""
    members, start = [], 0
    for name, parameter, placement in parameters:
        members.append(Member(name, parameter, placement, start))
        start = members[-1].stop
    return members


def padded(numel: int, shards: int) -> int:
    """``numel`` rounded up so that all ``shards`` are equal and aligned."""
    unit = shards * ALIGNMENT
    return -(-numel // unit) * unit


def pieces_of_shard(members: Sequence[Member], first: int, last: int) -> Iterator[Piece]:
    """The parts of each member that lie in [first, last) of the flat buffer."""
    for member in members:
        lo, hi = max(member.start, first), min(member.stop, last)
        if lo < hi:
            yield Piece(member, lo - member.start, hi - member.start, lo - first, hi - first)


class FlatGroup:
    """Parameters of one kind (type, weight decay, placement), in flat buffers that ``shards`` ranks share."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter, ParamPlacement]],
        weight_decay: float,
        shard: int,
        shards: int,
    ) -> None:
        self.members = lay_out(parameters)
        self.weight_decay = weight_decay
        first, placement = self.members[0].parameter, self.members[0].placement
        self.split_over = placement.shard.mode if placement.shard else None
        self.partial_over = placement.partial_over
        numel = padded(self.members[-1].stop, shards)
        self.values = torch.zeros(numel, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(numel, dtype=_wide(first.dtype), device=first.device)
        self._adopt()
        size = numel // shards
        self.first, self.last = shard * size, (shard + 1) * size
        self.value_shard = self.values[self.first : self.last]
        self.grad_shard = self.grads[self.first : self.last]
        same = self.values.dtype == self.grads.dtype
        self.main = nn.Parameter(self.value_shard if same else self.value_shard.to(self.grads.dtype))
        self.main.grad = self.grad_shard

    @torch.no_grad()
    def _adopt(self) -> None:
        """Move every member into the flat buffers; from here on it is a view of them."""
        for member in self.members:
            parameter, where = member.parameter, slice(member.start, member.stop)
            view = self.values[where].view_as(parameter)
            view.copy_(parameter)
            parameter.data = view
            attach_main_grad(parameter, self.grads[where].view_as(parameter))

    @torch.no_grad()
    def main_to_values(self) -> None:
        """Round the wider main parameters into this rank's shard of the values; nothing where they are the same
        memory."""
        if self.main.dtype != self.values.dtype:
            self.value_shard.copy_(self.main)

    @torch.no_grad()
    def values_to_main(self) -> None:
        """Widen this rank's shard of the values into the main parameters, after values were loaded."""
        if self.main.dtype != self.values.dtype:
            self.main.copy_(self.value_shard)

    def pieces(self) -> Iterator[Piece]:
        """Which parts of which parameters this rank's shard holds."""
        return pieces_of_shard(self.members, self.first, self.last)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of gradients and main parameters."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
