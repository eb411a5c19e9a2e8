"""The optimizer over stages and shards: a table on both end stages counts once, an early reduction changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.config.schema import AdamConfig, HybridZeroConfig
from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.param_state import main_grad_of
from internlm.core.parallel.sharding import Sharding, StageLayers, building
from internlm.solver.optimizer import HybridZeroOptimizer, ProcessGroups
from tests.harness.pool import run_ranks
from tests.unit.model.samples import decoder, tokens

ADAM = AdamConfig(lr=1e-2)
ALONE = Group(ParallelMode.ZERO1)


def world(mode: ParallelMode) -> Group:
    assert dist.group.WORLD is not None
    return Group.of(mode, dist.group.WORLD)


def _step_of_stage(rank: int, world_size: int, clip: float) -> tuple[float, Tensor]:
    """Return the norm of gradients that are 1 everywhere, and the table after a step."""
    with building(Sharding(), StageLayers(2, (range(rank, rank + 1),))):
        model = decoder(tie_word_embeddings=True)
    stages = world(ParallelMode.PIPELINE)
    optimizer = HybridZeroOptimizer(
        model, ADAM, HybridZeroConfig(clip_grad_norm=clip), ProcessGroups(pipeline=stages, ends=stages)
    )
    for parameter in model.parameters():
        main_grad_of(parameter).fill_(1.0)
    norm = optimizer.step(1e-2, 0.95).grad_norm
    return norm, model.embedding.weight.detach().clone()


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_tied_table_on_both_end_stages_counts_once(clip: float) -> None:
    """Its gradient is the sum of both, and both copies stay equal."""
    whole = decoder(tie_word_embeddings=True)
    table, rest = whole.embedding.weight.numel(), sum(parameter.numel() for parameter in whole.parameters())
    (one, first), (other, last) = run_ranks(2, _step_of_stage, clip)
    assert one == other == pytest.approx(math.sqrt(2**2 * table + (rest - table)), rel=1e-12)
    assert torch.equal(first, last)
    assert not torch.equal(first, whole.embedding.weight)


def _steps_of_shards(rank: int, world_size: int, begun: bool) -> tuple[list[float], list[Tensor]]:
    model = decoder()
    zero = HybridZeroConfig(clip_grad_norm=0.5, overlap_sync_grad=begun)
    optimizer = HybridZeroOptimizer(model, ADAM, zero, ProcessGroups(zero=world(ParallelMode.ZERO1)))
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        for attempt in range(1 + begun):  # the first reduction is dropped
            optimizer.zero_grad()
            seed = 10 * step + rank + (0 if attempt == begun else 50)
            model(tokens(1, 8, seed=seed), labels=tokens(1, 8, seed=seed + 100)).loss_sum.backward()
            if begun:
                optimizer.begin_reduction()
        norms.append(optimizer.step(1e-2, 0.95).grad_norm)
    return norms, [parameter.detach().clone() for parameter in model.parameters()]


def test_an_early_reduction_changes_no_bit() -> None:
    """Neither does one that zero_grad drops."""
    for ours, theirs in zip(run_ranks(2, _steps_of_shards, True), run_ranks(2, _steps_of_shards, False), strict=True):
        assert ours[0] == theirs[0]
        assert len(set(ours[0])) == 3
        assert all(map(torch.equal, ours[1], theirs[1]))
