"""Weights that are fetched ahead under isp: the same results as without, in the order that was promised, and no more
memory than promised."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, HybridZeroConfig
from internlm.core.context.group import Group
from internlm.core.context.parallel_mode import ParallelMode
from internlm.core.parallel.attach import attach_communicators
from internlm.core.parallel.deferred import deferring
from internlm.core.parallel.ledger import LEDGER, Traffic
from internlm.core.parallel.main_grad import attach_main_grad
from internlm.core.parallel.part import Part
from internlm.core.parallel.sharding import Sharding, Share, building
from internlm.core.parallel.weight_gatherer import LAUNCH_PLACES, Overlap, WeightGatherer
from internlm.model.decoder import Decoder
from internlm.solver.optimizer import HybridZeroOptimizer, ProcessGroups
from tests.harness.pool import run_ranks
from tests.unit.model.samples import decoder, tokens

STEPS, MICRO_BATCHES, LENGTH = 3, 2, 16
#: Without a neighbour's part, and with pieces that end within each of both.
CUTS = torch.tensor([0, 5, 8, 13, LENGTH], dtype=torch.int32)

NONE = Overlap()
MODULE = Overlap(enabled=True, per_layer=False)
LAYER = {place: Overlap(enabled=True, launch_place=number) for place, number in LAUNCH_PLACES.items()}
OVERLAPS = {"module": MODULE, **{f"layer, {place}": overlap for place, overlap in LAYER.items()}}
RECOMPUTE = {"nothing": 0.0, "the first layer": 0.5, "all": 1.0}


@dataclass(frozen=True)
class Case:
    """How weights are fetched, and the model."""

    overlap: Overlap = NONE
    recompute: float = 0.0
    tied: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def reference(self) -> Case:
        return Case(NONE, self.recompute, self.tied, self.dtype)


class Ranks(NamedTuple):
    """A model that is split over all ranks, its tokens as well, and who gathers its weights."""

    model: Decoder
    gatherer: WeightGatherer
    tensor: Group
    weight: Group


def split(rank: int, world_size: int, case: Case) -> Ranks:
    share = Share(rank, world_size)
    with building(Sharding("isp", share, share)):
        model = decoder(dtype=case.dtype, checkpoint=case.recompute, tie_word_embeddings=case.tied)
    world = dist.group.WORLD
    assert world is not None
    tensor, weight = Group.of(ParallelMode.TENSOR, world), Group.of(ParallelMode.WEIGHT, world)
    gatherer = attach_communicators(model, "isp", tensor, weight, case.overlap)
    assert gatherer is not None
    return Ranks(model, gatherer, tensor, weight)


def own(group: Group, seed: int) -> Tensor:
    """This rank's tokens of a row: [LENGTH / ranks]."""
    return tokens(LENGTH, seed=seed).chunk(group.size)[group.rank]


def loss_of(ranks: Ranks, seed: int) -> Tensor:
    ids, labels = own(ranks.tensor, seed), own(ranks.tensor, seed + 100)
    indexes = torch.cat([torch.arange(int(n)) for n in CUTS.diff()]).chunk(ranks.tensor.size)[ranks.tensor.rank]
    return ranks.model(ids, CUTS, indexes, labels, grad_scale=1 / LENGTH).loss_sum


def assert_nothing_is_left(gatherer: WeightGatherer) -> None:
    assert (gatherer._coming, gatherer._held, gatherer._delivery) == ({}, {}, None)


# -- results


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    traffic: Traffic
    buffers: dict[tuple[int, ...], int]
    """How many were made of each shape."""


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
    """By shape, every buffer that it uses from now on; they are kept, so that no two have the same address."""
    made: dict[tuple[int, ...], dict[int, Tensor]] = {}
    make = gatherer._buffer

    def watched(shard: Tensor) -> Tensor:
        buffer = make(shard)
        made.setdefault(tuple(buffer.shape), {})[buffer.data_ptr()] = buffer
        return buffer

    gatherer._buffer = watched
    return made


#: What went before, by case: many are compared with the same run.
_trained: dict[tuple[int, Case], list[Result]] = {}


def trained(world_size: int, case: Case) -> list[Result]:
    key = world_size, case
    if key not in _trained:
        _trained[key] = run_ranks(world_size, _train, case)
    return _trained[key]


def assert_same(case: Case, world_size: int = 2) -> None:
    """Bit by bit, and not a byte more."""
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
    return Overlap(overlap.enabled, overlap.per_layer, overlap.launch_place, memory_pool)


@pytest.mark.parametrize("memory_pool", [False, True], ids=["new buffers", "pool"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_fetching_ahead_changes_nothing(overlap: str, recompute: str, memory_pool: bool) -> None:
    assert_same(Case(pooled(OVERLAPS[overlap], memory_pool), RECOMPUTE[recompute]))


@pytest.mark.parametrize("overlap", ["module", "layer, wo"])
@pytest.mark.parametrize(
    "case", [Case(tied=True), Case(dtype=torch.bfloat16, recompute=0.5), Case(dtype=torch.float64)]
)
def test_nor_for_other_models(overlap: str, case: Case) -> None:
    assert_same(Case(pooled(OVERLAPS[overlap], True), case.recompute, case.tied, case.dtype))


@pytest.mark.parametrize("overlap", ["module", "layer, w1"])
def test_nor_on_four_ranks(overlap: str) -> None:
    """Where the vocabulary and one of the widths are padded."""
    assert_same(Case(pooled(OVERLAPS[overlap], True), 0.5), world_size=4)


def test_a_pool_alone_changes_nothing_either() -> None:
    """One buffer of each shape is enough where nothing is fetched ahead."""
    case = Case(Overlap(memory_pool=True))
    assert_same(case)
    for result in trained(2, case):
        assert set(result.buffers.values()) == {1}


def test_without_a_pool_buffers_are_made_for_every_use() -> None:
    assert min(trained(2, Case(MODULE))[0].buffers.values()) > 2


def test_training_goes_somewhere() -> None:
    """Equal results would be no wonder if nothing changed from step to step."""
    result = trained(2, Case())[0]
    assert len(set(result.losses)) == len(result.losses)
    assert all(norm > 0 for norm in result.norms)


# -- order


def watch(gatherer: WeightGatherer) -> list[str]:
    """What it does from now on: ``f3``, weight 3 is fetched; ``u3``, it is used; ``U3``, in a backward product."""
    events: list[str] = []
    numbers = {linear.weight.data_ptr(): number for number, linear in enumerate(gatherer.linears)}
    make, take = gatherer._buffer, gatherer.take

    def fetched(shard: Tensor) -> Tensor:
        events.append(f"f{numbers[shard.data_ptr()]}")
        return make(shard)

    def taken(number: int, backward: bool) -> Tensor:
        whole = take(number, backward)
        events.append(f"{'U' if backward else 'u'}{number}")
        return whole

    gatherer._buffer, gatherer.take = fetched, taken
    return events


def _orders(rank: int, world_size: int, case: Case) -> tuple[str, str, str]:
    """What happens in a forward pass, and in the first and the second backward pass."""
    ranks = split(rank, world_size, case)
    HybridZeroOptimizer(ranks.model, AdamConfig(lr=1e-2))
    events, found = watch(ranks.gatherer), []
    for _ in range(2):
        loss = loss_of(ranks, 1)
        found.append(take_all(events))
        loss.backward()
        found.append(take_all(events))
    assert found[0] == found[2]
    return found[0], found[1], found[3]


def take_all(events: list[str]) -> str:
    text = " ".join(events)
    events.clear()
    return text


#: Two blocks of wqkv, wo, w13 and w2, and the head, 8.
AS_NEEDED = "f0 u0 f1 u1 f2 u2 f3 u3 f4 u4 f5 u5 f6 u6 f7 u7 f8 u8"
FORWARD = {
    "module": "f0 f1 u0 f2 u1 f3 u2 f4 u3 f5 u4 f6 u5 f7 u6 f8 u7 u8",
    "layer, wqkv": "f0 f4 f5 f6 f7 u0 f1 u1 f2 u2 f3 u3 f8 u4 u5 u6 u7 u8",
    "layer, attn": "f0 u0 f4 f5 f6 f7 f1 u1 f2 u2 f3 u3 u4 f8 u5 u6 u7 u8",
    "layer, wo": "f0 u0 f1 f4 f5 f6 f7 u1 f2 u2 f3 u3 u4 f8 u5 u6 u7 u8",
    "layer, w1": "f0 u0 f1 u1 f2 f4 f5 f6 f7 u2 f3 u3 u4 u5 f8 u6 u7 u8",
}
BACKWARD = "f7 f6 U7 f5 U6 f4 U5 f3 U4 f2 U3 f1 U2 f0 U1 U0"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_order(overlap: str) -> None:
    """Forward by layer or by module, backward always one ahead."""
    assert run_ranks(2, _orders, Case(OVERLAPS[overlap])) == [(FORWARD[overlap], BACKWARD, BACKWARD)] * 2


def test_order_without_overlap() -> None:
    backward = "f7 U7 f6 U6 f5 U5 f4 U4 f3 U3 f2 U2 f1 U1 f0 U0"
    assert run_ranks(2, _orders, NONE_CASE) == [(AS_NEEDED, backward, backward)] * 2


NONE_CASE = Case()
#: Block 1 is recomputed and goes backward, up to its last product; the same of block 0.
AGAIN_1 = "f4 f5 u4 f6 u5 f7 u6 u7 f7 f6 U7 f5 U6 f4 U5"
AGAIN_0 = "f1 u0 f2 u1 f3 u2 u3 f3 f2 U3 f1 U2 f0 U1 U0"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_order_where_all_is_recomputed(overlap: str) -> None:
    """That block 0 is recomputed is known once it was seen: then its first weight comes next and not its last."""
    first = f"{AGAIN_1} f3 U4 f0 f1 u0 f2 u1 u2 u3 f3 f2 U3 f1 U2 f0 U1 U0"
    second = f"{AGAIN_1} f0 U4 {AGAIN_0}"
    assert run_ranks(2, _orders, Case(OVERLAPS[overlap], 1.0)) == [(FORWARD[overlap], first, second)] * 2


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_order_where_the_first_layer_is_recomputed(overlap: str) -> None:
    first = "f7 f6 U7 f5 U6 f4 U5 f3 U4 f0 f1 u0 f2 u1 u2 u3 f3 f2 U3 f1 U2 f0 U1 U0"
    second = f"f7 f6 U7 f5 U6 f4 U5 f0 U4 {AGAIN_0}"
    assert run_ranks(2, _orders, Case(OVERLAPS[overlap], 0.5)) == [(FORWARD[overlap], first, second)] * 2


# -- weights that change, and models used by themselves


@torch.no_grad()
def _changed_between(rank: int, world_size: int, overlap: Overlap) -> list[float]:
    """Losses before a change of the weights, after it, and after it was undone."""
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
    """They can't come late there: autograd takes what it is given."""
    case = Case(OVERLAPS[overlap])
    for alone, ours in zip(run_ranks(2, _gradients, case, False), run_ranks(2, _gradients, case, True), strict=True):
        assert alone.keys() == ours.keys()
        for name, grad in ours.items():
            assert torch.equal(alone[name], grad), name


def _partly_frozen(rank: int, world_size: int, overlap: Overlap) -> dict[str, Tensor]:
    """The lower block takes no part in backward, nor does one linear of the upper one."""
    ranks = split(rank, world_size, Case(overlap))
    frozen: list[nn.Module] = [ranks.model.embedding, ranks.model.layers[0], ranks.model.layers[1].attention.wo]
    for module in frozen:
        module.requires_grad_(False)
    for seed in range(2):
        loss_of(ranks, seed).backward()
        assert_nothing_is_left(ranks.gatherer)
    return {name: p.grad.clone() for name, p in ranks.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_what_is_fetched_for_a_product_that_is_not_needed_is_given_up(overlap: str) -> None:
    found = run_ranks(2, _partly_frozen, pooled(OVERLAPS[overlap], True))
    for ours, theirs in zip(found, run_ranks(2, _partly_frozen, NONE), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert "layers.1.feed_forward.w2.weight" in ours
        assert not any(name.startswith("layers.0") for name in ours)


class _BrokenError(Exception):
    """Breaks a pass off."""


def _break_off(ranks: Ranks, where: str) -> None:
    """A pass that does not come to its end, in one way or another."""
    layer = ranks.model.layers[0]

    def fail(*_: object) -> None:
        raise _BrokenError

    if where == "backward":
        hook = layer.register_forward_hook(lambda module, inputs, out: out.register_hook(fail) and None)
    elif where == "loss":
        hook = ranks.model.norm.register_forward_hook(fail)
    with contextlib.suppress(_BrokenError):
        if where == "hidden units alone":
            with torch.no_grad():
                ranks.model._blocks(0, None, own(ranks.tensor, 1), CUTS, None)
            return
        loss_of(ranks, 1).backward()
    hook.remove()


def _after_a_broken_pass(rank: int, world_size: int, overlap: Overlap, where: str) -> dict[str, Tensor]:
    """Gradients of a pass that comes after one that was broken off, and after a change of the weights."""
    ranks = split(rank, world_size, Case(overlap, dtype=torch.float64))
    for parameter in ranks.model.parameters():
        attach_main_grad(parameter, torch.zeros_like(parameter))
    _break_off(ranks, where)
    with torch.no_grad():
        for parameter in ranks.model.parameters():
            parameter.main_grad.zero_()
            parameter.mul_(1.5)
    loss_of(ranks, 1).backward()
    assert_nothing_is_left(ranks.gatherer)
    return {name: parameter.main_grad.clone() for name, parameter in ranks.model.named_parameters()}


@pytest.mark.parametrize("where", ["backward", "loss", "hidden units alone"])
@pytest.mark.parametrize("overlap", ["module", "layer, attn"])
def test_a_pass_that_was_broken_off_leaves_nothing(overlap: str, where: str) -> None:
    found, wanted = (run_ranks(2, _after_a_broken_pass, o, where) for o in (OVERLAPS[overlap], NONE))
    for mine, reference in zip(found, wanted, strict=True):
        assert all(torch.equal(mine[name], reference[name]) for name in reference)


# -- chunks of a pipeline stage


def _of_two_chunks(rank: int, world_size: int, overlap: Overlap) -> tuple[list[str], dict[str, Tensor]]:
    """What happens in F of either chunk and B of either, and the gradients."""
    share = Share(rank, world_size)
    with building(Sharding("isp", share, share), Part(2, (range(1), range(1, 2)))):
        model = decoder()
    world = dist.group.WORLD
    assert world is not None
    group = Group.of(ParallelMode.WEIGHT, world)
    gatherer = attach_communicators(model, "isp", Group.of(ParallelMode.TENSOR, world), group, overlap)
    assert gatherer is not None
    for parameter in model.parameters():
        attach_main_grad(parameter, torch.zeros_like(parameter))
    events, found = watch(gatherer), []

    def done() -> None:
        found.append(take_all(events))
        assert_nothing_is_left(gatherer)

    ids, labels = own(group, 1), own(group, 2)
    hidden = model(ids, CUTS, chunk=0)
    done()
    given = hidden.detach().requires_grad_()
    loss = model(ids, CUTS, labels=labels, chunk=1, hidden=given).loss_sum
    done()
    loss.backward()
    done()
    with deferring() as tasks:
        hidden.backward(given.grad)
    done()
    for task in tasks:
        task()
    assert_nothing_is_left(gatherer)
    return found, {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


#: What is used in F of chunk 0, F of chunk 1, its B and that of chunk 0.
CHUNKS = "u0 u1 u2 u3", "u4 u5 u6 u7 u8", "U7 U6 U5 U4", "U3 U2 U1 U0"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_no_gather_crosses_the_border_of_a_chunk(overlap: str) -> None:
    """What is fetched in an action is used in it; and gradients are delivered, put off or not."""
    found, wanted = (run_ranks(2, _of_two_chunks, o) for o in (OVERLAPS[overlap], NONE))
    for (actions, gradients), (_, reference) in zip(found, wanted, strict=True):
        for action, used in zip(actions, CHUNKS, strict=True):
            events = action.split()
            assert [event for event in events if event[0] != "f"] == used.split()
            assert {event[1:] for event in events if event[0] == "f"} == {event[1:] for event in used.split()}
        assert actions[2].startswith("f7 f6 U7")  # ahead, that is
        assert actions[3].startswith("f3 f2 U3")
        assert not [name for name in reference if not torch.equal(gradients[name], reference[name])]
        assert all(gradient.any() for gradient in gradients.values())
