"""Models whose weights and tokens isp splits over all ranks, and ways to prefetch their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.attach import attach_communicators
from internlm.core.parallel.sharding import GroupPosition, Sharding, building
from internlm.core.parallel.weight_gatherer import LAUNCH_POSITIONS, Overlap, WeightGatherer
from internlm.model.decoder import Decoder
from tests.unit.model.samples import decoder, tokens

LENGTH = 16
#: Sequence boundaries, of which some lie within the tokens of either rank.
CUTS = torch.tensor([0, 5, 8, 13, LENGTH], dtype=torch.int32)

NONE = Overlap()
MODULE = Overlap(enabled=True, per_layer=False)
LAYER = {name: Overlap(enabled=True, launch_position=position) for name, position in LAUNCH_POSITIONS.items()}
OVERLAPS = {"module": MODULE, **{f"layer, {name}": overlap for name, overlap in LAYER.items()}}


@dataclass(frozen=True)
class Case:
    """Options of the weight gatherer and of the model."""

    overlap: Overlap = NONE
    recompute: float = 0.0
    tied: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def reference(self) -> Case:
        return Case(NONE, self.recompute, self.tied, self.dtype)


class Ranks(NamedTuple):
    """A model that is split over all ranks, the gatherer of its weights, and the groups."""

    model: Decoder
    gatherer: WeightGatherer
    tensor: Group
    weight: Group


def split(rank: int, world_size: int, case: Case) -> Ranks:
    share = GroupPosition(rank, world_size)
    with building(Sharding("isp", share, share)):
        model = decoder(dtype=case.dtype, checkpoint=case.recompute, tie_word_embeddings=case.tied)
    world = dist.group.WORLD
    assert world is not None
    tensor, weight = Group.of(ParallelMode.TENSOR, world), Group.of(ParallelMode.WEIGHT, world)
    gatherer = attach_communicators(model, "isp", tensor, weight, case.overlap)
    assert gatherer is not None
    return Ranks(model, gatherer, tensor, weight)


def own(group: Group, seed: int) -> Tensor:
    """Draw this rank's tokens of a row: [LENGTH / ranks]."""
    return tokens(LENGTH, seed=seed).chunk(group.size)[group.rank]


def loss_of(ranks: Ranks, seed: int) -> Tensor:
    ids, labels = own(ranks.tensor, seed), own(ranks.tensor, seed + 100)
    indexes = torch.cat([torch.arange(int(n)) for n in CUTS.diff()]).chunk(ranks.tensor.size)[ranks.tensor.rank]
    return ranks.model(ids, CUTS, indexes, labels, grad_scale=1 / LENGTH).loss_sum


def assert_nothing_is_left(gatherer: WeightGatherer) -> None:
    assert (gatherer._gathers, gatherer._in_use, gatherer._delivery) == ({}, {}, None)
