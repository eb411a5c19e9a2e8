"""Weights that isp prefetches: the same results as without, and no more buffers than documented."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, HybridZeroConfig
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.ledger import LEDGER, Traffic
from internlm.core.parallel.param_state import attach_main_grad, main_grad_of
from internlm.core.parallel.weight_gatherer import Overlap, WeightGatherer
from internlm.solver.optimizer import HybridZeroOptimizer, ProcessGroups
from tests.dist.isp_ranks import (
    MODULE,
    NONE,
    OVERLAPS,
    Case,
    Ranks,
    assert_nothing_is_left,
    loss_of,
    split,
)
from tests.harness.pool import run_ranks

STEPS, MICRO_BATCHES = 2, 2
RECOMPUTE = {"nothing": 0.0, "the first layer": 0.5, "all": 1.0}


# -- results


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    traffic: Traffic
    buffers: dict[tuple[int, ...], int]
    """Number allocated of each shape."""


def _train(rank: int, world_size: int, case: Case) -> Result:
    ranks = split(rank, world_size, case)
    model, gatherer = ranks.model, ranks.gatherer
    zero, groups = HybridZeroConfig(clip_grad_norm=1.0), ProcessGroups(split=(ranks.weight,))
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), zero, groups)
    made, before = buffers_made(gatherer), LEDGER.snapshot()
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            loss = loss_of(ranks, 10 * step + micro_batch)
            loss.backward()
            losses.append(loss.item())
            assert_nothing_is_left(gatherer)
        norms.append(optimizer.step(1e-2, 0.95).grad_norm)
        with torch.no_grad():
            losses.append(loss_of(ranks, 50).item())
        assert_nothing_is_left(gatherer)
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {shape: len(of_shape) for shape, of_shape in made.items()}
    return Result(losses, norms, parameters, LEDGER.since(before), buffers)


def buffers_made(gatherer: WeightGatherer) -> dict[tuple[int, ...], dict[int, Tensor]]:
    """Record every buffer that it uses from now on, by shape; they are kept, so that no two have the same address."""
    made: dict[tuple[int, ...], dict[int, Tensor]] = {}
    make = gatherer._new_buffer

    def watched(shard: Tensor) -> Tensor:
        buffer = make(shard)
        made.setdefault(tuple(buffer.shape), {})[buffer.data_ptr()] = buffer
        return buffer

    gatherer._new_buffer = watched
    return made


#: Results by case: many cases are compared with the same run.
_trained: dict[tuple[int, Case], list[Result]] = {}


def trained(world_size: int, case: Case) -> list[Result]:
    key = world_size, case
    if key not in _trained:
        _trained[key] = run_ranks(world_size, _train, case)
    return _trained[key]


def assert_same(case: Case, world_size: int = 2) -> None:
    """Compare a case with its reference: bitwise the same results and the same traffic."""
    for ours, theirs in zip(trained(world_size, case), trained(world_size, case.reference), strict=True):
        assert ours.losses == theirs.losses
        assert ours.norms == theirs.norms
        assert ours.parameters.keys() == theirs.parameters.keys()
        for name, value in theirs.parameters.items():
            assert torch.equal(ours.parameters[name], value), name
        assert ours.traffic == theirs.traffic
        assert ours.traffic[ParallelMode.WEIGHT, "all-gather"].calls > 0
        if case.overlap.memory_pool:
            assert max(ours.buffers.values()) <= 2


def pooled(overlap: Overlap, memory_pool: bool) -> Overlap:
    return Overlap(overlap.enabled, overlap.per_layer, overlap.launch_position, memory_pool)


@pytest.mark.parametrize(
    ("recompute", "memory_pool"),
    [
        pytest.param(recompute, pool, marks=[] if pool or recompute == "the first layer" else [pytest.mark.wide])
        for recompute in RECOMPUTE
        for pool in (False, True)
    ],
)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_prefetching_changes_nothing(overlap: str, recompute: str, memory_pool: bool) -> None:
    assert_same(Case(pooled(OVERLAPS[overlap], memory_pool), RECOMPUTE[recompute]))


@pytest.mark.parametrize("overlap", ["module", "layer, wo"])
@pytest.mark.parametrize(
    "case", [Case(tied=True), Case(dtype=torch.bfloat16, recompute=0.5), Case(dtype=torch.float64)]
)
def test_prefetching_changes_nothing_for_other_models(overlap: str, case: Case) -> None:
    assert_same(Case(pooled(OVERLAPS[overlap], True), case.recompute, case.tied, case.dtype))


@pytest.mark.parametrize("overlap", ["module", "layer, w1"])
def test_prefetching_changes_nothing_on_four_ranks(overlap: str) -> None:
    """The vocabulary and one of the widths are padded there."""
    assert_same(Case(pooled(OVERLAPS[overlap], True), 0.5), world_size=4)


def test_a_pool_without_prefetching_changes_nothing() -> None:
    """One buffer of each shape is enough then."""
    case = Case(Overlap(memory_pool=True))
    assert_same(case)
    for result in trained(2, case):
        assert set(result.buffers.values()) == {1}


def test_without_a_pool_every_use_allocates_a_buffer() -> None:
    assert min(trained(2, Case(MODULE))[0].buffers.values()) > 2


def test_training_changes_losses() -> None:
    """Equal results would prove nothing if no step changed anything."""
    result = trained(2, Case())[0]
    assert len(set(result.losses)) == len(result.losses)
    assert all(norm > 0 for norm in result.norms)


# -- weights that change, and models used by themselves


@torch.no_grad()
def _changed_between(rank: int, world_size: int, overlap: Overlap) -> list[float]:
    """Return losses before a change of the weights, after it, and after it was undone."""
    ranks = split(rank, world_size, Case(overlap, dtype=torch.float64))
    found = [loss_of(ranks, 1).item()]
    weights = [linear.weight for linear in ranks.gatherer.linears]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(1.5)
    found.append(loss_of(ranks, 1).item())
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)
    found.append(loss_of(ranks, 1).item())
    assert_nothing_is_left(ranks.gatherer)
    return found


@pytest.mark.parametrize("memory_pool", [False, True])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_changed_weights_are_seen_by_the_next_pass(overlap: str, memory_pool: bool) -> None:
    found = run_ranks(2, _changed_between, pooled(OVERLAPS[overlap], memory_pool))
    assert found == run_ranks(2, _changed_between, NONE)
    for before, after, undone in found:
        assert before == undone
        assert before != after


def _gradients(rank: int, world_size: int, case: Case, with_optimizer: bool) -> dict[str, Tensor]:
    ranks = split(rank, world_size, case)
    if with_optimizer:
        HybridZeroOptimizer(ranks.model, AdamConfig(lr=1e-2), process_groups=ProcessGroups(split=(ranks.weight,)))
    for seed in range(2):
        loss_of(ranks, seed).backward()
    assert_nothing_is_left(ranks.gatherer)
    return {name: parameter.grad.clone() for name, parameter in ranks.model.named_parameters()}


@pytest.mark.parametrize("overlap", ["module", "layer, wo"])
def test_a_model_without_our_optimizer_gets_its_gradients(overlap: str) -> None:
    """They can't be delivered late there: autograd takes what backward returns."""
    case = Case(OVERLAPS[overlap])
    for alone, ours in zip(run_ranks(2, _gradients, case, False), run_ranks(2, _gradients, case, True), strict=True):
        assert alone.keys() == ours.keys()
        for name, grad in ours.items():
            assert torch.equal(alone[name], grad), name


def _partly_frozen(rank: int, world_size: int, overlap: Overlap) -> dict[str, Tensor]:
    """Freeze the lower block and one linear of the upper one."""
    ranks = split(rank, world_size, Case(overlap))
    frozen: list[nn.Module] = [ranks.model.embedding, ranks.model.layers["0"], ranks.model.layers["1"].attention.wo]
    for module in frozen:
        module.requires_grad_(False)
    for seed in range(2):
        loss_of(ranks, seed).backward()
        assert_nothing_is_left(ranks.gatherer)
    return {name: p.grad.clone() for name, p in ranks.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_weight_prefetched_for_a_product_that_is_not_needed_is_released(overlap: str) -> None:
    found = run_ranks(2, _partly_frozen, pooled(OVERLAPS[overlap], True))
    for ours, theirs in zip(found, run_ranks(2, _partly_frozen, NONE), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert "layers.1.feed_forward.w2.weight" in ours
        assert not any(name.startswith("layers.0") for name in ours)


class _BrokenError(Exception):
    """Ends a pass early."""


def _break_off(ranks: Ranks, where: str) -> None:
    """Run a pass that ends early, in one of several ways."""
    layer = ranks.model.layers["0"]

    def fail(*_: object) -> None:
        raise _BrokenError

    if where == "backward":
        hook = layer.register_forward_hook(lambda module, inputs, out: out.register_hook(fail) and None)
    else:
        hook = ranks.model.norm.register_forward_hook(fail)
    with contextlib.suppress(_BrokenError), torch.set_grad_enabled(where != "forward without gradients"):
        loss_of(ranks, 1).backward()
    hook.remove()


def _after_a_failed_pass(rank: int, world_size: int, overlap: Overlap, where: str) -> dict[str, Tensor]:
    """Return gradients of a pass after one that ended early and a change of the weights."""
    ranks = split(rank, world_size, Case(overlap, dtype=torch.float64))
    for parameter in ranks.model.parameters():
        attach_main_grad(parameter, torch.zeros_like(parameter))
    _break_off(ranks, where)
    with torch.no_grad():
        for parameter in ranks.model.parameters():
            main_grad_of(parameter).zero_()
            parameter.mul_(1.5)
    loss_of(ranks, 1).backward()
    assert_nothing_is_left(ranks.gatherer)
    return {name: main_grad_of(parameter).clone() for name, parameter in ranks.model.named_parameters()}


@pytest.mark.parametrize("where", ["backward", "forward", "forward without gradients"])
@pytest.mark.parametrize("overlap", ["module", "layer, attn"])
def test_a_pass_that_ends_early_leaves_nothing(overlap: str, where: str) -> None:
    found, wanted = (run_ranks(2, _after_a_failed_pass, o, where) for o in (OVERLAPS[overlap], NONE))
    for mine, reference in zip(found, wanted, strict=True):
        assert all(torch.equal(mine[name], reference[name]) for name in reference)
